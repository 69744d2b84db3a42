"""The examples: the demo end to end, Omniglot's loader, episodes and training on tiny data."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import _common
import demo
import omniglot

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


# ---- episodes -----------------------------------------------------------------------------------


def numbered(classes: int, variants: int, drawings: int) -> np.ndarray:
    """An image table whose pixels say where they are from: (class, variant, drawing)."""
    where = np.indices((classes, variants, drawings)).transpose(1, 2, 3, 0)
    return where.astype(np.uint8)


@pytest.mark.parametrize(
    ("classes", "variants", "drawings", "ways", "shots", "queries"),
    [(24, 4, 20, 5, 1, 15), (5, 1, 6, 5, 3, 3), (7, 2, 9, 3, 5, 4), (250, 1, 20, 250, 1, 1)],
)
def test_episodes_are_balanced_and_disjoint(classes, variants, drawings, ways, shots, queries):
    table = numbered(classes, variants, drawings)
    draw = _common.Episodes(table, ways=ways, shots=shots, queries=queries, seed=3)
    batch = draw(40)
    assert batch.xs.shape == (40, ways * shots, 3) and batch.xq.shape == (40, ways * queries, 3)
    assert batch.xs.dtype == torch.float32 and batch.ys.dtype == torch.int64
    for xs, ys, xq, yq in zip(*batch, strict=True):
        assert torch.bincount(ys, minlength=ways).tolist() == [shots] * ways
        assert torch.bincount(yq, minlength=ways).tolist() == [queries] * ways
        # A label stands for one (class, variant), and no two labels for the same class.
        meaning = {int(y): tuple(x[:2].tolist()) for x, y in zip(xs, ys, strict=True)}
        assert all(meaning[int(y)] == tuple(x[:2].tolist()) for x, y in zip(xs, ys, strict=True))
        assert all(meaning[int(y)] == tuple(x[:2].tolist()) for x, y in zip(xq, yq, strict=True))
        assert len({first for first, _ in meaning.values()}) == ways
        rows = [tuple(x.tolist()) for x in torch.cat([xs, xq])]
        assert len(set(rows)) == len(rows)


def test_episodes_reach_everything_and_repeat_with_their_seed():
    table = numbered(9, 4, 6)
    draw, again, other = (
        _common.Episodes(table, ways=3, shots=1, queries=2, seed=s) for s in (1, 1, 2)
    )
    first = draw(500)
    seen = {tuple(x.tolist()) for x in torch.cat([first.xs, first.xq], dim=1).flatten(0, 1)}
    assert len(seen) == 9 * 4 * 6
    assert torch.equal(first.xq, again(500).xq)
    assert not torch.equal(first.xq, other(500).xq)
    assert not torch.equal(first.xq, draw(500).xq)


@pytest.mark.parametrize("among", [5, 8, 300, 4400])
def test_distinct_draws_are_distinct_and_uniform(among):
    drawn = _common.distinct(np.random.default_rng(0), 4000, 5, among)
    assert drawn.min() >= 0 and drawn.max() < among
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    # The mean of each place is near the middle: 6 standard errors of a uniform draw.
    error = 6 * among / np.sqrt(12 * len(drawn))
    assert np.abs(drawn.mean(axis=0) - (among - 1) / 2).max() < error


def test_episodes_refuse_what_the_table_cannot_give():
    table = numbered(4, 1, 6)
    with pytest.raises(ValueError, match="there are 6"):
        _common.Episodes(table, ways=3, shots=5, queries=2)
    with pytest.raises(ValueError, match="there are 4"):
        _common.Episodes(table, ways=5, shots=1, queries=2)


def test_mean_interval():
    mean, half = _common.mean_interval(np.array([0.0, 1.0] * 200))
    assert mean == 0.5
    assert half == pytest.approx(1.96 * 0.5 / 20, rel=2e-3)  # n - 1 in the variance
    with pytest.raises(ValueError, match="two values"):
        _common.mean_interval(np.array([1.0]))


# ---- Omniglot -----------------------------------------------------------------------------------


def test_omniglot_loads_both_forms(tiny):
    bits, grey = omniglot.load(tiny, "bits"), omniglot.load(tiny, "grey")
    assert bits.shape == (CLASSES, DRAWINGS, 28, 28)
    assert np.array_equal(bits, tiny_images())
    assert np.array_equal(grey, 255 * tiny_images())


def test_omniglot_refuses_other_files(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, images=np.zeros((2, 3, 5, 5), np.uint8))
    with pytest.raises(ValueError, match="images_nearest_bits"):
        omniglot.load(path, "bits")
    with pytest.raises(ValueError, match="images is uint8"):
        omniglot.load(path, "grey")


def test_omniglot_split_shares_no_character(tiny):
    images = omniglot.load(tiny)
    parts = omniglot.split(images, train=14, validation=4, seed=0)
    assert [p.shape for p in parts] == [
        (14, 4, DRAWINGS, 784),
        (4, 1, DRAWINGS, 784),
        (6, 1, DRAWINGS, 784),
    ]
    # An upright first drawing tells its character.
    keys = [[drawing.tobytes() for drawing in part[:, 0, 0]] for part in parts]
    assert len({key for part in keys for key in part}) == CLASSES
    repeated = omniglot.split(images, train=14, validation=4, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, repeated, strict=True))
    with pytest.raises(ValueError, match="none to test"):
        omniglot.split(images, train=20, validation=4, seed=0)


def test_omniglot_rotations():
    image = np.zeros((1, 1, 28, 28), np.uint8)
    image[0, 0, 2, 5] = 1  # row 2, column 5
    turned = omniglot.turned(image).reshape(4, 28, 28)
    # A quarter turn takes (row, column) to (27 - column, row).
    assert [tuple(np.argwhere(t)[0]) for t in turned] == [(2, 5), (22, 2), (25, 22), (5, 25)]


def small_run(tiny: Path, *options: str) -> list[str]:
    return [
        *("--data", str(tiny), "--train-classes", "14", "--validation-classes", "5"),
        *("--ways", "3", "--tasks", "8", "--validation-tasks", "30", "--test-tasks", "30"),
        *("--validate-every", "15", *options),
    ]


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
    parts = omniglot.split(omniglot.load(tiny), 14, 5, seed=0)
    tasks = _common.Episodes(parts.validation, ways=3, shots=1, queries=15, seed=2)(20)
    torch.manual_seed(0)
    maml = omniglot.learner(args)
    best = omniglot.Best(maml, tasks, [1])
    accuracy = best.look(1)
    kept = {name: value.clone() for name, value in maml.state_dict().items()}
    with torch.no_grad():
        for parameter in maml.parameters():
            parameter.zero_()
    assert best.look(2) < accuracy
    assert best.iteration == 1 and best.accuracy == accuracy
    assert all(torch.equal(best.state[name], value) for name, value in kept.items())


# ---- the demo -----------------------------------------------------------------------------------


def test_turned_digits():
    drawings = np.zeros((1, 400, 8, 8), np.float32)
    drawings[:, :, 1, 3:5] = 16.0  # a mark above the middle
    table = demo.turned(drawings, copies=1, seed=0)
    assert table.shape == (1, 1, 400, 64) and table.dtype == np.uint8
    images = table.reshape(400, 8, 8).astype(float)
    row, column = np.mgrid[:8, :8] - 3.5
    mass = images.sum(axis=(1, 2))
    middle = [(images * axis).sum(axis=(1, 2)) / mass for axis in (row, column)]
    angle = np.rad2deg(np.arctan2(middle[1], -middle[0]))
    limit = demo.LARGEST_TURN
    assert np.abs(angle).max() < limit + 2 and np.abs(angle).max() > 0.9 * limit
    assert abs(angle.mean()) < 6 * limit / np.sqrt(3 * 400)


def test_mixtures_are_made_of_halves():
    drawings = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) + np.zeros((3, 4, 8, 8), "f4")
    mixed = demo.mixtures(drawings, seed=0)
    assert mixed.shape == (3 + 2 * 3 * 2, 4, 8, 8)
    assert np.array_equal(mixed[:3], drawings)
    corners = {(m[0, 0, 0], m[0, 0, 7], m[0, 7, 0], m[0, 7, 7]) for m in mixed[3:]}
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    assert corners == {(a, a, b, b) for a, b in pairs} | {(a, b, a, b) for a, b in pairs}


def test_digits_held_out_cover_all():
    assert {digit for held in demo.HELD_OUT for digit in held} == set(range(10))


def test_sinusoids_are_sinusoids():
    draw = demo.Sinusoids(10, 7, seed=0)
    batch = draw(50)
    assert batch.xs.shape == (50, 10, 1) and batch.xq.shape == (50, 7, 1)
    for x, y in ((batch.xs, batch.ys), (batch.xq, batch.yq)):
        expected = torch.from_numpy(draw.amplitude) * torch.sin(x - torch.from_numpy(draw.phase))
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory):
    """The whole demo, small: its results and its figure."""
    path = tmp_path_factory.mktemp("demo") / "figures" / "demo.png"
    return demo.main(["--quick", "--out", str(path)]), path


def test_demo_scores(demo_run):
    results, _ = demo_run
    assert len(results) == 3
    for problem, methods in results.items():
        assert set(methods) == {demo.MAML, demo.PRETRAINED, demo.SCRATCH}
        sizes = {len(scores[steps]) for scores in methods.values() for steps in demo.STEPS}
        assert len(sizes) == 1, problem
        before, one, after = (methods[demo.MAML][steps].mean() for steps in (0, 1, 5))
        scratch = {steps: methods[demo.SCRATCH][steps].mean() for steps in (1, 5)}
        if "error" in problem:
            assert after < 0.8 * before
            assert after < 0.7 * scratch[5]
            assert all(np.all(scores[0] >= 0) for scores in methods.values())
        else:
            assert after > before + 10
            assert one > scratch[1] + 8
            assert all(np.all((s >= 0) & (s <= 100)) for m in methods.values() for s in m.values())


def test_demo_table(demo_run):
    results, _ = demo_run
    lines = demo.table(results).splitlines()
    assert [line for line in lines if "accuracy" in line or "error" in line] == list(results)
    rows = [line for line in lines if line.startswith("  MAML")]
    assert len(rows) == 3 and all(row.count("±") == len(demo.STEPS) for row in rows)
    mean, _ = _common.mean_interval(next(iter(results.values()))[demo.MAML][5])
    assert f"{mean:.1f} ±" in rows[0]


def test_demo_figure(demo_run):
    from matplotlib import image

    _, path = demo_run
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.01  # not an empty page


def test_tuning_picks_the_best_step_size():
    """With 'rates' of which all but one diverge or do nothing, that one is taken."""
    torch.manual_seed(0)
    tasks = demo.Sinusoids(10, 20, seed=1)(30)
    problem = demo.Problem("mse", demo.squared_errors, False, (0.0, 0.005, 1e6))
    network = demo.sinusoid_network()
    tuned = demo.tuned_scores([network], problem, tasks, tasks)
    assert np.array_equal(tuned[10], demo.scores_after(network, problem, tasks, 0.005, 10))
    assert np.array_equal(tuned[0], demo.scores_after(network, problem, tasks, 0.0, 0))
