"""The Omniglot examples: the loader, MAML, MAML++ and Reptile, on tiny data."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import source_tree
import torch

sys.path.insert(0, str(source_tree.need("examples") / "examples"))

import _common
import _omniglot
import maml_plus_plus
import omniglot
import reptile_omniglot
from cut_off import cut_off

import pymeta

CLASSES, DRAWINGS = 24, 20


def tiny_images() -> np.ndarray:
    """0/1 images [classes, drawings, 28, 28]; each class has its own patch, which all drawings
    share up to a few flipped pixels, and the first two bytes of pixels say class and drawing."""
    rng = np.random.default_rng(0)
    images = np.repeat(rng.random((CLASSES, 1, 28, 28)) < 0.3, DRAWINGS, axis=1)
    images ^= rng.random(images.shape) < 0.02
    return images.astype(np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in both forms of the layout that omniglot.py documents."""
    path = tmp_path_factory.mktemp("omniglot") / "tiny.npz"
    images = tiny_images()
    bits = np.packbits(images.reshape(CLASSES, DRAWINGS, -1), axis=-1)
    np.savez(path, images=255 * images, images_nearest_bits=bits)
    return path


def test_omniglot_loads_both_forms(tiny):
    bits, grey = _omniglot.load(tiny, "bits"), _omniglot.load(tiny, "grey")
    assert bits.shape == (CLASSES, DRAWINGS, 28, 28)
    assert np.array_equal(bits, tiny_images())
    assert np.array_equal(grey, 255 * tiny_images())


def test_omniglot_refuses_other_files(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, images=np.zeros((2, 3, 5, 5), np.uint8))
    with pytest.raises(ValueError, match="images_nearest_bits"):
        _omniglot.load(path, "bits")
    with pytest.raises(ValueError, match="images is uint8"):
        _omniglot.load(path, "grey")


def test_omniglot_split_shares_no_character(tiny):
    images = _omniglot.load(tiny)
    parts = _omniglot.split(images, train=14, validation=4, seed=0)
    assert [p.shape for p in parts] == [
        (14, 4, DRAWINGS, 784),
        (4, 1, DRAWINGS, 784),
        (6, 1, DRAWINGS, 784),
    ]
    # An upright first drawing tells its character.
    keys = [[drawing.tobytes() for drawing in part[:, 0, 0]] for part in parts]
    assert len({key for part in keys for key in part}) == CLASSES
    repeated = _omniglot.split(images, train=14, validation=4, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, repeated, strict=True))
    with pytest.raises(ValueError, match="none to test"):
        _omniglot.split(images, train=20, validation=4, seed=0)


def test_omniglot_rotations():
    image = np.zeros((1, 1, 28, 28), np.uint8)
    image[0, 0, 2, 5] = 1  # row 2, column 5
    turned = _omniglot.turned(image).reshape(4, 28, 28)
    # A quarter turn takes (row, column) to (27 - column, row).
    assert [tuple(np.argwhere(t)[0]) for t in turned] == [(2, 5), (22, 2), (25, 22), (5, 25)]
    both = _omniglot.turned(image, mirrored=True).reshape(8, 28, 28)
    assert np.array_equal(both[:4], turned)
    # The mirror takes column to 27 - column before the turns.
    assert [tuple(np.argwhere(t)[0]) for t in both[4:]] == [(2, 22), (5, 2), (25, 5), (22, 25)]


def small_run(tiny: Path, *options: str) -> list[str]:
    return [
        *("--data", str(tiny), "--train-classes", "14", "--validation-classes", "5"),
        *("--ways", "3", "--tasks", "8", "--validation-tasks", "30", "--test-tasks", "30"),
        *("--validate-every", "15", *options),
    ]


def test_omniglot_with_convolutions_is_native(tiny, monkeypatch, capsys):
    monkeypatch.setattr(_omniglot, "CHANNELS", 8)
    options = ["--network", "conv4", "--iterations", "15", "--inner-lr", "0.4"]
    result = omniglot.main(small_run(tiny, *options, "--mirrored", "--shift", "1"), quiet=True)
    assert "native-cpu" in capsys.readouterr().out
    assert 0.5 < result["accuracy"] <= 1  # of three classes


def test_maml_plus_plus_learns(tiny, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = small_run(
        tiny, "--channels", "8", "--steps", "2", "--iterations", "16", "--multi-step-until", "8",
        "--first-order-until", "4", "--outer-lr", "3e-3", "--mirrored", "--shift", "1",
        "--json", str(out), "--quiet",
    )  # fmt: skip
    result = maml_plus_plus.main(options)
    assert "native-cpu" in capsys.readouterr().out
    assert 0.5 < result["accuracy"][0] <= 1  # of three classes
    assert 0.5 < result["accuracy_of_one"][0] <= 1
    assert sorted(result["chosen_iterations"]) == [15, 16]
    assert 0 < result["accuracy_by_running_statistics"][0] != result["accuracy"][0]
    assert [point[0] for point in result["curve"]] == [15, 16]
    assert np.shape(result["step_sizes"]) == (2, 5)  # four convolutions and the last layer
    assert '"curve"' in out.read_text()


def test_maml_plus_plus_goes_over_to_the_last_step():
    weights = [maml_plus_plus.step_weights(5, progress) for progress in (0, 0.5, 1)]
    assert all(float(w.sum()) == pytest.approx(1) for w in weights)
    assert weights[0].tolist() == pytest.approx([0.2] * 5)
    assert float(weights[1][-1]) == pytest.approx(0.6)
    assert weights[2].tolist() == pytest.approx([0.006] * 4 + [0.976])


def timeless(result: dict) -> dict:
    """A result without its times and files."""
    found = {k: v for k, v in result.items() if not k.endswith("_seconds") and k != "recipe"}
    found["curve"] = [point[:3] for point in result.get("curve", [])]
    return found


@pytest.mark.parametrize("example", [omniglot, maml_plus_plus])
def test_training_goes_on_from_its_checkpoint(tiny, tmp_path, monkeypatch, example):
    """To the last bit: whatever training changes is in the file."""
    monkeypatch.setattr(_omniglot, "HIDDEN", (16, 8))
    options = small_run(tiny, "--iterations", "8", "--validate-every", "3", "--tasks", "2")
    options += {omniglot: ["--learn-lr", "layer"],
                maml_plus_plus: ["--channels", "4", "--steps", "2", "--multi-step-until", "5",
                                 "--first-order-until", "1", "--quiet"]}[example]  # fmt: skip
    run = example.main if example is maml_plus_plus else partial(example.main, quiet=True)
    whole = run(options)
    options += ["--checkpoint", str(tmp_path / "run.pt")]
    with cut_off(_common.Episodes, tasks=2, at=5):  # three iterations are in the file
        run(options)
    torch.manual_seed(99)
    assert timeless(run(options)) == timeless(whole)
    assert timeless(run(options)) == timeless(whole)  # nothing is left to train
    with pytest.raises(ValueError, match=r"run.pt is of a run with --seed 0, not 1"):
        run([*options, "--seed", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_training_starts_from_the_best_learner_of_another_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(_omniglot, "HIDDEN", (16, 8))
    file = tmp_path / "one_shot.pt"
    options = small_run(tiny, "--learn-lr", "layer", "--tasks", "2")
    first = omniglot.main([*options, "--iterations", "3", "--checkpoint", str(file)], quiet=True)
    # Iterations: none. The learner is tested as it comes.
    again = [*options, "--iterations", "0", "--start-from", str(file)]
    assert omniglot.main(again, quiet=True)["accuracy"] == first["accuracy"]
    assert omniglot.main([*again, "--shots", "5"], quiet=True)["accuracy"] != first["accuracy"]


@pytest.mark.parametrize("shots", ["1", "5"])
def test_omniglot_learns(tiny, tmp_path, shots):
    out = tmp_path / "result.json"
    options = small_run(tiny, "--shots", shots, "--iterations", "40", "--json", str(out))
    result = omniglot.main(options, quiet=True)
    assert result["accuracy"] > 0.8  # chance is 1/3; the classes are well apart
    assert 0 <= result["interval"] < 0.1
    assert result["iterations"] == 40
    assert result["chosen_iteration"] in (15, 30, 40)
    assert '"accuracy"' in out.read_text()


def test_omniglot_is_repeatable(tiny):
    options = small_run(tiny, "--iterations", "5", "--learn-lr", "layer")
    first, second = (omniglot.main(options, quiet=True) for _ in range(2))
    assert first["validation_accuracy"] == second["validation_accuracy"]
    assert first["accuracy"] == second["accuracy"]


def test_omniglot_keeps_the_best_learner(tiny):
    args = omniglot.arguments(small_run(tiny))
    parts = _omniglot.split(_omniglot.load(tiny), 14, 5, seed=0)
    tasks = _common.Episodes(parts.validation, ways=3, shots=1, queries=15, seed=2)(20)
    torch.manual_seed(0)
    maml = omniglot.learner(args)
    best = _omniglot.Best(maml, tasks, [1])
    accuracy = best.look(1)
    kept = {name: value.clone() for name, value in maml.state_dict().items()}
    with torch.no_grad():
        for parameter in maml.parameters():
            parameter.zero_()
    assert best.look(2) < accuracy
    assert best.iteration == 1 and best.accuracy == accuracy
    assert all(torch.equal(best.state[name], value) for name, value in kept.items())


def test_several_learners_decide_by_the_mean_of_their_probabilities(tiny):
    args = omniglot.arguments(small_run(tiny))
    parts = _omniglot.split(_omniglot.load(tiny), 14, 5, seed=0)
    tasks = _common.Episodes(parts.validation, ways=3, shots=1, queries=15, seed=2)(20)
    maml = omniglot.learner(args)
    kept = _omniglot.Kept(maml, most=2)
    shares = {}
    for seed, accuracy in enumerate((0.3, 0.1, 0.5)):
        maml.load_state_dict(omniglot.learner(args).state_dict())  # another start
        shares[seed] = _omniglot.predictions(maml, tasks, 1).softmax(-1)
        assert kept.offer(accuracy, seed) == (seed in (0, 2))
    assert [(score, seed) for score, seed, _ in kept.found] == [(0.5, 2), (0.3, 0)]
    again = _omniglot.Kept(maml, most=2)
    again.load_state_dict(kept.state_dict())
    states = [state for _, _, state in again.found]
    mean = (shares[0] + shares[2]) / 2
    expected = (mean.argmax(-1) == tasks.yq).double().mean(-1).numpy()
    assert np.array_equal(_omniglot.evaluate_together(maml, states, tasks, 1), expected)
    alone = _omniglot.evaluate_together(maml, states[:1], tasks, 1)
    assert not np.array_equal(alone, expected)


# ---- Reptile -------------------------------------------------------------------------------------


def test_reptile_omniglot_split(tiny):
    train, test = reptile_omniglot.tables(_omniglot.load(tiny), 18)
    assert train.shape == (18, 4, DRAWINGS, 784) and test.shape == (6, 1, DRAWINGS, 784)
    keys = [[drawing.tobytes() for drawing in part[:, 0, 0]] for part in (train, test)]
    assert len({key for part in keys for key in part}) == CLASSES
    with pytest.raises(ValueError, match="none to test"):
        reptile_omniglot.tables(_omniglot.load(tiny), CLASSES)


def reptile_options(tiny: Path, *options: str) -> list[str]:
    return [
        *("--data", str(tiny), "--train-classes", "18", "--ways", "3", "--test-tasks", "30"),
        *("--iterations", "60", *options),
    ]


def test_reptile_omniglot_learns(tiny, tmp_path):
    out = tmp_path / "result.json"
    result = reptile_omniglot.main(reptile_options(tiny, "--json", str(out)), quiet=True)
    for kind in ("alone", "transductive"):
        assert result["accuracy"][kind] > 0.6  # chance is 1/3; the classes are well apart
        assert 0 <= result["interval"][kind] < 0.2
    assert '"transductive"' in out.read_text()


def test_reptile_omniglot_without_batch_norm_sees_each_query_alone(tiny):
    options = reptile_options(tiny, "--no-batch-norm", "--iterations", "5", "--test-steps", "5")
    result = reptile_omniglot.main(options, quiet=True)
    assert result["accuracy"]["alone"] == result["accuracy"]["transductive"]
    assert result["recipe"]["no_batch_norm"]


def test_reptile_omniglot_queries_alone(tiny):
    """One by one is what a model makes of the support set and that query alone."""
    _, held_out = reptile_omniglot.tables(_omniglot.load(tiny), 18)
    tasks = _common.Episodes(held_out, ways=3, shots=1, queries=2, seed=0)(4)
    net = reptile_omniglot.network(3, batch_norm=True)
    reptile = pymeta.Reptile(net, loss="cross_entropy", lr=0.1, steps=1)
    models = reptile.adapt(tasks.xs, tasks.ys)
    found = reptile_omniglot.alone(models, tasks)
    assert found.shape == (4, 6, 3)
    for t in range(4):
        for q in range(6):
            rows = torch.cat([tasks.xs[t], tasks.xq[t, q : q + 1]])
            torch.testing.assert_close(found[t, q], models[t](rows)[-1], rtol=1e-4, atol=1e-5)
