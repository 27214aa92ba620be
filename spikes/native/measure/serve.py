"""python serve.py native|grpcio echo|gateway PORT NODE_PORT: what `load.sh` measures. Ends with its standard input."""

import asyncio
import sys

from dl_inference_core.grpcio_transport import GrpcioTransport
from dl_inference_core.transport import Limits, Method
from dl_inference_native import NativeTransport

PATH = "/inference.GRPCInferenceService/ModelInfer"


class Service:
    methods = {PATH: Method()}
    private_trailers = frozenset({"x-private"})

    def __init__(self, begin):
        self.begin = begin

    def begin_all(self, exchanges):
        for exchange in exchanges:
            self.begin(exchange)

    def ended(self, exchange, code):
        pass


def done(error, trailers, seconds):
    if error is not None:
        print(error, file=sys.stderr)


async def main(name, role, port, node):
    made = {"native": NativeTransport, "grpcio": GrpcioTransport}[name]
    transport = made(made.Options())
    connection = transport.connect(f"127.0.0.1:{node}", Limits())
    if role == "echo":
        service = Service(lambda exchange: exchange.reply(exchange.message))
    else:
        service = Service(lambda exchange: exchange.forward(connection, PATH, done, timeout_s=10.0))
    server = await transport.serve(service, (f"127.0.0.1:{port}",), Limits())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.drain(0)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
