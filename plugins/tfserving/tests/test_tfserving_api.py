from __future__ import annotations

from dl_inference_tfserving.api import TfServingApi

from dl_inference_core.testing import ApiConformance


class TestTfServingApi(ApiConformance):
    api_class = TfServingApi
