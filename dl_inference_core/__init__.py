"""dl_inference_core: serve deep learning models and balance over many nodes, on one gRPC port."""

__version__ = "0.1.0"
