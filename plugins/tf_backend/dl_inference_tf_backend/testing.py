"""SavedModels of every kind, made by real TensorFlow, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite_signatures(folder: Path, change: Callable[[Any], None]) -> Path:
    """Let `change` edit the `SignatureDef`s, by name, of the SavedModel in `folder`; returns `folder`."""
    from tensorflow.core.protobuf import saved_model_pb2

    file = folder / "saved_model.pb"
    content = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    change(content.meta_graphs[0].signature_def)
    file.write_bytes(content.SerializeToString())
    return folder


class SavedModelMaker:
    """Each method writes a SavedModel into `folder` and returns it."""

    def double(self, folder: Path, factor: float = 2.0) -> Path:
        """TensorFlow 2: y = factor · x, float32 of shape [?, 3]."""
        import tensorflow as tf

        class Double(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                self.factor = tf.Variable(factor)

            @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
            def __call__(self, x: Any) -> Any:
                return {"y": x * self.factor}

        module = Double()
        tf.saved_model.save(module, str(folder), signatures={"serving_default": module.__call__})
        return folder

    def half_plus_two(self, folder: Path, plus: float = 2.0) -> Path:
        """TensorFlow 1: y = x / 2 + plus, by the signatures "serving_default" (predict), "regress", "classify",
        "scores_only" and "classes_only"."""
        import tensorflow as tf

        v1 = tf.compat.v1
        utils = v1.saved_model.signature_def_utils
        with tf.Graph().as_default(), v1.Session() as session:
            half = v1.get_variable("half", initializer=0.5)
            serialized = v1.placeholder(tf.string, [None], name="tf_example")
            features = tf.io.parse_example(
                serialized, {"x": tf.io.FixedLenFeature([1], tf.float32, default_value=[0.0])}
            )
            x = tf.identity(features["x"], name="x")
            y = tf.add(x * half, plus, name="y")
            fed = v1.placeholder(tf.float32, [None, 1], name="fed")
            answer = tf.add(fed * half, plus, name="answer")
            classes = tf.broadcast_to(tf.constant([["low", "high"]]), [tf.shape(y)[0], 2])
            scores = tf.concat([10.0 - y, y], axis=1)
            session.run(v1.global_variables_initializer())
            info = v1.saved_model.build_tensor_info
            examples = {"inputs": info(serialized)}
            builder = v1.saved_model.Builder(str(folder))
            builder.add_meta_graph_and_variables(
                session,
                ["serve"],
                signature_def_map={
                    "serving_default": utils.predict_signature_def({"x": fed}, {"y": answer}),
                    "regress": utils.build_signature_def(examples, {"outputs": info(y)}, "tensorflow/serving/regress"),
                    "classify": utils.build_signature_def(
                        examples, {"classes": info(classes), "scores": info(scores)}, "tensorflow/serving/classify"
                    ),
                    "scores_only": utils.build_signature_def(
                        examples, {"scores": info(scores)}, "tensorflow/serving/classify"
                    ),
                    "classes_only": utils.build_signature_def(
                        examples, {"classes": info(classes)}, "tensorflow/serving/classify"
                    ),
                },
            )
            builder.save()
        return folder

    def keras(self, folder: Path) -> tuple[Path, Any]:
        """What `model.export` of a small network writes; and the network."""
        import keras

        keras.utils.set_random_seed(7)
        network = keras.Sequential(
            [keras.layers.Input((4,), name="features"), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)]
        )
        network.export(str(folder), verbose=False)
        return folder, network

    def text(self, folder: Path) -> Path:
        """Strings in, in capitals out, and their lengths; by a table, a label for each that is known."""
        import tensorflow as tf

        (folder.parent).mkdir(parents=True, exist_ok=True)
        vocabulary = folder.parent / "vocabulary.txt"
        vocabulary.write_text("cat\ndog\n")

        class Text(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = tf.lookup.StaticVocabularyTable(
                    tf.lookup.TextFileInitializer(
                        str(vocabulary), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE,
                        tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER,
                    ),
                    num_oov_buckets=1,
                )  # fmt: skip

            @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="words")])
            def __call__(self, words: Any) -> Any:
                return {
                    "capitals": tf.strings.upper(words),
                    "lengths": tf.strings.length(words),
                    "number": self.table.lookup(words),
                }

        module = Text()
        tf.saved_model.save(module, str(folder), signatures=module.__call__)
        vocabulary.unlink()  # what is saved has a copy
        return folder

    def counter(self, folder: Path) -> Path:
        """Adds what it is given to a variable and tells the sum."""
        import tensorflow as tf

        class Counter(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                self.sum = tf.Variable(0, dtype=tf.int64)

            @tf.function(input_signature=[tf.TensorSpec([], tf.int64, name="by")])
            def __call__(self, by: Any) -> Any:
                return {"sum": self.sum.assign_add(by)}

        module = Counter()
        tf.saved_model.save(module, str(folder), signatures=module.__call__)
        return folder

    def several(self, folder: Path) -> Path:
        """No default signature, but "add" (a, b → sum, difference) and "norm" (v of unknown rank → norm)."""
        import tensorflow as tf

        class Several(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)])
            def add(self, a: Any, b: Any) -> Any:
                return {"sum": a + b, "difference": a - b}

            @tf.function(input_signature=[tf.TensorSpec(None, tf.float64)])
            def norm(self, v: Any) -> Any:
                return {"norm": tf.sqrt(tf.reduce_sum(v * v))}

        module = Several()
        tf.saved_model.save(module, str(folder), signatures={"add": module.add, "norm": module.norm})
        return folder

    def dtypes(self, folder: Path, names: list[str]) -> Path:
        """Gives back an input of each dtype, under the same name."""
        import tensorflow as tf

        specs = {name: tf.TensorSpec([None, 2], getattr(tf, name)) for name in names}

        class Same(tf.Module):
            @tf.function(input_signature=[specs])
            def __call__(self, given: Any) -> Any:
                return {name: tf.identity(value) for name, value in given.items()}

        module = Same()

        @tf.function
        def flat(**given: Any) -> Any:
            return module(given)

        tf.saved_model.save(module, str(folder), signatures=flat.get_concrete_function(**specs))
        return folder

    def picky(self, folder: Path) -> Path:
        """Fails by an assertion in the graph where an input is negative."""
        import tensorflow as tf

        class Picky(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
            def __call__(self, x: Any) -> Any:
                with tf.control_dependencies([tf.debugging.assert_non_negative(x, "x is negative")]):
                    return {"root": tf.sqrt(x)}

        module = Picky()
        tf.saved_model.save(module, str(folder), signatures=module.__call__)
        return folder

    def dense(self, folder: Path) -> Path:
        """y = x · w, of float32: x [?, 3], w [3, 2]."""
        import tensorflow as tf

        class Dense(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = tf.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

            @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
            def __call__(self, x: Any) -> Any:
                return {"y": tf.matmul(x, self.w)}

        module = Dense()
        tf.saved_model.save(module, str(folder), signatures=module.__call__)
        return folder

    def unsigned(self, folder: Path) -> Path:
        """A function, and no signature."""
        import tensorflow as tf

        module = tf.Module()
        module.f = tf.function(lambda x: {"y": 2 * x})
        tf.saved_model.save(module, str(folder))
        return folder

    def ragged(self, folder: Path) -> Path:
        """By the default signature y = 3 · x, float32 of shape [?, 3], and y as a ragged tensor."""
        import tensorflow as tf

        class Ragged(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
            def __call__(self, x: Any) -> Any:
                return {"y": 3 * x, "ragged": tf.RaggedTensor.from_tensor(3 * x)}

        module = Ragged()
        tf.saved_model.save(module, str(folder), signatures=module.__call__)
        return folder

    def defaults(self, folder: Path) -> Path:
        """Signatures with inputs that may be left out: the default one y = x + shift (x [?, 3], shift [?, 1] is 10),
        "scaled" y = x · factor (factor [] is 2) and "greeting" text = word + end (word [?], end [] is "!")."""
        import tensorflow as tf

        x = tf.TensorSpec([None, 3], tf.float32, name="x")
        ten, two, mark = tf.constant([[10.0]]), tf.constant(2.0), tf.constant("!")

        class Defaults(tf.Module):
            @tf.function(input_signature=[x, tf.TensorSpec([None, 1], tf.float32, name="shift")])
            def shifted(self, x: Any, shift: Any = ten) -> Any:
                return {"y": x + shift}

            @tf.function(input_signature=[x, tf.TensorSpec([], tf.float32, name="factor")])
            def scaled(self, x: Any, factor: Any = two) -> Any:
                return {"y": x * factor}

            @tf.function(
                input_signature=[
                    tf.TensorSpec([None], tf.string, name="word"),
                    tf.TensorSpec([], tf.string, name="end"),
                ]
            )
            def greeting(self, word: Any, end: Any = mark) -> Any:
                return {"text": tf.strings.join([word, end])}

        module = Defaults()
        tf.saved_model.save(
            module,
            str(folder),
            signatures={
                "serving_default": module.shifted, "scaled": module.scaled, "greeting": module.greeting,
            },
        )  # fmt: skip
        return folder

    def broken(self, folder: Path) -> Path:
        """A SavedModel whose variables are missing."""
        self.double(folder)
        for file in (folder / "variables").iterdir():
            file.unlink()
        return folder

    def odd(self, folder: Path) -> Path:
        """Beside y = 2 · x the signatures "constant", without inputs, and "passed", whose output is its input."""
        import tensorflow as tf

        v1 = tf.compat.v1
        utils, info = v1.saved_model.signature_def_utils, v1.saved_model.build_tensor_info
        predict = "tensorflow/serving/predict"
        with tf.Graph().as_default(), v1.Session() as session:
            x = v1.placeholder(tf.float32, [None], name="x")
            builder = v1.saved_model.Builder(str(folder))
            builder.add_meta_graph_and_variables(
                session,
                ["serve"],
                signature_def_map={
                    "serving_default": utils.predict_signature_def({"x": x}, {"y": 2 * x}),
                    "constant": utils.build_signature_def({}, {"seven": info(tf.constant(7))}, predict),
                    "passed": utils.predict_signature_def({"key": x}, {"key": x}),
                },
            )
            builder.save()
        return folder
