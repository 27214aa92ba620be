"""A real `SeldonClient`: reads calls as JSON lines, prints an outcome as JSON for each. Runs in `.venv-seldon`.

A call is {"address": "host:port", "method": "predict" | "microservice", "arguments": {…}, "client": {…}}; in its
arguments, "data" is an array as nested lists, "bin_data" a text to be encoded, "raw_data" a SeldonMessage as JSON.
"client" holds further arguments of the client itself.
"""

import json
import sys

import numpy as np
from google.protobuf import json_format
from seldon_core.seldon_client import SeldonClient


def call(address, method, arguments, client):
    if "data" in arguments:
        arguments["data"] = np.array(arguments["data"])
    if "bin_data" in arguments:
        arguments["bin_data"] = arguments["bin_data"].encode()
    given = {
        "deployment_name": "anything",
        "transport": "grpc",
        "gateway": "seldon" if "raw_data" in arguments else "istio",
        **client,
    }
    client = SeldonClient(gateway_endpoint=address, microservice_endpoint=address, client_return_type="proto", **given)
    if method == "microservice":
        arguments = {"method": "predict", **arguments}
    outcome = getattr(client, method)(**arguments)
    answer = json_format.MessageToDict(outcome.response) if outcome.response is not None else None
    return {"success": outcome.success, "message": outcome.msg, "answer": answer}


for line in sys.stdin:
    print(json.dumps(call(**json.loads(line))), flush=True)
