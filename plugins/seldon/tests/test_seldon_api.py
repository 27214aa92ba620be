from __future__ import annotations

from dl_inference_seldon.api import SeldonApi

from dl_inference_core.testing import ApiConformance


class TestSeldonApi(ApiConformance):
    api_class = SeldonApi
