def test_smoke(peer, tasks):
    print(peer.text())
    from dl_inference_core.client import Client
    import numpy as np
    with Client(peer.address) as c:
        print(c.predict("linear", {"x": np.ones((2,3),np.float32)}))
        print(c.predict("linear", np.ones((2,3),np.float32)))
        print(c.predict(69, "abc"), c.predict(69, b"abc"), c.predict(69, np.ones(3)), c.predict(69, {"a": 1}))
        print(c.predict("words", "abc"), c.predict("one-tag", np.ones(2)))
