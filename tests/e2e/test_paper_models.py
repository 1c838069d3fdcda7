"""F5 to F8 at their smallest scale, and their parts against planted results and hand computation."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mujax.errors import DataError

COLUMNS = {"claim", "measured", "interval", "holds"}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Sentences of numbers in two languages."""
    one = ["eins", "zwei", "drei", "vier", "fünf", "sechs"]
    other = ["one", "two", "three", "four", "five", "six"]
    random = np.random.default_rng(0)
    rows = [random.integers(0, 6, random.integers(2, 7)) for _ in range(120)]
    lines = ["\t".join(" ".join(words[place] for place in row) for words in (one, other)) for row in rows]
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def records_of(path):
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {tuple(line["key"]): line for line in lines if "key" in line}


def run(paper, name, out, capsys, *more):
    command = [name, "--scale", "tiny", "--out", str(out), *more]
    assert paper.main(command) == 0
    printed = capsys.readouterr()
    report = json.loads((out / f"{name}-tiny.json").read_text())
    assert report["command"].startswith(f"python -m benchmarks.paper {name} --scale tiny")
    assert report["rows"]
    assert all(set(row) == COLUMNS for row in report["rows"])
    assert all(row["claim"] in printed.out for row in report["rows"])
    assert report["minutes"] > 0
    assert report["flops"] > 0
    assert (out / f"{name}-tiny.png").stat().st_size > 5000
    # The second call finds everything.
    lines = (out / f"{name}-tiny.jsonl").read_text()
    assert paper.main(command) == 0
    assert (out / f"{name}-tiny.jsonl").read_text() == lines
    assert capsys.readouterr().out == printed.out
    return report


def test_language(paper, tmp_path, capsys):
    report = run(paper, "F6", tmp_path, capsys)
    assert len(report["rows"]) == 3
    # A proxy of an eighth of the width and fewer steps: its searches are cheap even here.
    assert report["rows"][-1]["holds"] is True


def test_masked(paper, tmp_path, capsys):
    assert len(run(paper, "F7", tmp_path, capsys)["rows"]) == 3


def test_images(paper, tmp_path, capsys):
    if not pathlib.Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    run(paper, "F8", tmp_path, capsys)
    records = records_of(tmp_path / "F8-tiny.jsonl").values()
    trials = [trial for record in records if record["key"][0] == "search" for trial in record["trials"]]
    assert len(trials) == 4
    assert all(0 <= trial["metrics"].get("accuracy", 0) <= 1 for trial in trials)


def test_translation(paper, pairs_file, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sacrebleu")
    run(paper, "F5", tmp_path, capsys, "--pairs", str(pairs_file))
    records = records_of(tmp_path / "F5-tiny.jsonl")
    searches = [records["search", name]["trials"] for name in ("proxy", "target", "direct")]
    hparams = [[trial["hparams"] for trial in trials] for trials in searches]
    # What makes the trials of the proxy comparable: the same draws.
    assert hparams[0] == hparams[1] == hparams[2]
    assert all("bleu" in trial["metrics"] for trials in searches for trial in trials if trial["loss"])


# ---- data -----------------------------------------------------------------------------------------------


def test_pairs_are_numbered_and_read_back(paper, pairs_file):
    pytest.importorskip("tokenizers")
    corpus, digest = paper._pairs.load(pairs_file, vocab_size=300, length=32)
    assert len(corpus.source) == len(corpus.target) == 108
    assert len(corpus.held_source) == 12
    assert (corpus.target[:, 0] == paper._pairs.START).all()
    lines = [line.split("\t") for line in pairs_file.read_text(encoding="utf-8").splitlines()]
    for row in (0, 50):
        assert [corpus.text(part[row]).strip() for part in (corpus.source, corpus.target)] == lines[row]
    ends = (corpus.target == paper._pairs.END).sum(1)
    assert (ends == 1).all()
    assert paper._pairs.load(pairs_file, vocab_size=300, length=32)[1] == digest
    short, other = paper._pairs.load(pairs_file, vocab_size=300, length=6)
    assert 0 < len(short.source) < 108
    assert other != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\ttwo\n" * 5, "got 5 lines."),
        ("one\ttwo\n" * 30 + "three\n", "got another number of tabs in pair 31."),
    ],
)
def test_a_file_that_has_no_pairs(paper, tmp_path, text, message):
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match="at least 20 lines of two sentences with a tab between") as error:
        paper._pairs.load(path, vocab_size=300, length=8)
    assert str(error.value).endswith(message)


def test_a_missing_package_is_named(paper):
    with pytest.raises(DataError, match=r'no_such_package: .*pip install "mujax-mup\[paper\]"'):
        paper._pairs.needed("no_such_package")


def test_whole_words_are_masked(paper):
    text = b"the quick, brown fox: jumps over 13 lazy dogs and one more word in it "
    tokens = jnp.asarray(np.tile(np.frombuffer(text, np.uint8), (400, 1)).astype(np.int32))
    inputs, targets = map(np.asarray, paper.masked.hide(tokens, jax.random.key(0)))
    tokens, hidden = np.asarray(tokens), targets >= 0
    np.testing.assert_array_equal(targets[hidden], tokens[hidden])
    np.testing.assert_array_equal(inputs[~hidden], tokens[~hidden])
    words = [(4, 9), (11, 16), (17, 20)]
    for start, end in words:
        assert set(hidden[:, start:end].sum(1)) == {0, end - start}
        assert 0.08 < hidden[:, start].mean() < 0.22
    # Nothing but words, and never by way of a word's neighbour.
    letters = np.array([chr(byte).isalpha() for byte in text])
    assert not hidden[:, ~letters].any()
    assert 0 < (hidden[:, 4] & hidden[:, 11]).mean() < 0.06
    share = (inputs == paper.masked.MASK)[hidden].mean()
    assert 0.75 < share < 0.85


def test_the_loss_of_masked_bytes_is_theirs_alone(paper):
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[1, -1, -1], [-1, 4, -1]])
    lower = jax.nn.log_softmax(logits)
    expected = -(lower[0, 0, 1] + lower[1, 1, 4]) / 2
    assert float(paper.masked.masked_loss(logits, targets)) == pytest.approx(float(expected), rel=1e-5)
    assert float(paper.masked.masked_loss(logits, np.full((2, 3), -1))) == 0


def test_greedy_decoding_follows_the_most_likely_subword(paper):
    """The most likely subword is the last one plus the first of the source."""

    def apply(source, target):
        return jax.nn.one_hot((target + source[:, :1]) % 50, 50)

    found = paper.translation.greedy(apply, jnp.array([[3, 0, 0, 0], [7, 0, 0, 0]]))
    np.testing.assert_array_equal(found, [[4, 7, 10, 13], [8, 15, 22, 29]])


def test_padding_has_no_part_in_the_loss_of_a_translation(paper):
    logits = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
    lower = jax.nn.log_softmax(logits)
    found = paper.translation.translation_loss(logits, np.array([[3, 2, 0]]))
    assert float(found) == pytest.approx(-float(lower[0, 0, 3] + lower[0, 1, 2]) / 2, rel=1e-5)


@pytest.mark.parametrize(("wanted", "have", "batches"), [(2, 100, 2), (8, 20, 2), (8, 64, 8)])
def test_held_out_data_comes_in_whole_batches(paper, wanted, have, batches):
    arrays = np.arange(have * 4.0).reshape(have, 2, 2, 1), np.arange(have)
    found = paper._search.held_out(arrays, batch=8, batches=wanted)
    assert [inputs.shape for inputs, _ in found] == [(8, 2, 2, 1)] * batches
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in found]), np.arange(8 * batches))


def test_too_little_held_out_data_is_one_sentence(paper, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 185)
    assert paper.main(["F7", "--text", str(text), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "held-out data: expected at least one batch of 16 examples, got 15; give more data."


# ---- judges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "other", "options", "holds"),
    [
        ([1.0, 1.01, 0.99], [2.0, 2.01, 1.99], {}, True),
        ([2.0, 2.01, 1.99], [1.0, 1.01, 0.99], {}, False),
        ([1.0, 3.0, 2.0], [1.5, 2.5, 2.1], {}, None),
        ([1.0, 3.0, 2.0], [1.5, 2.5, 2.1], {"higher": True}, None),
        ([0.9, 0.91, 0.9], [0.8, 0.81, 0.8], {"higher": True}, True),
        ([0.8, 0.81, 0.8], [0.9, 0.91, 0.9], {"higher": True}, False),
        ([1.0, 1.0], [1.0, 1.0], {}, None),
        ([1.0], [2.0], {}, None),
        (None, [2.0, 2.0], {}, False),
        ([1.0, 1.0], None, {}, True),
        (None, None, {}, None),
    ],
)
def test_a_comparison_is_judged_by_its_interval(paper, ours, other, options, holds):
    assert paper._search.compared("ours is better", ours, other, **options).holds is holds


def planted(paper, tmp_path, name, proxy_flops):
    """Searches whose losses are the same, of a target with 100 operations a trial."""
    results = paper._results.Results(tmp_path / f"{name}.jsonl", {})
    losses = list(np.random.default_rng(0).permutation(12) + 1.0)
    for search, flops in (("proxy", proxy_flops), ("target", 100.0), ("direct", 100.0)):
        trials = [
            {"hparams": {"x": place}, "loss": loss, "flops": flops, "metrics": {"bleu": 20 - loss}}
            for place, loss in enumerate(losses)
        ]
        results.add(("search", search), {"trials": trials}, 1.0, 12 * flops)
    return results


@pytest.mark.parametrize("measure", ["bleu", "loss"])
@pytest.mark.parametrize("factor", [1, 10])
def test_the_saving_of_a_search_of_the_same_worth_is_the_ratio_of_costs(paper, tmp_path, measure, factor):
    with planted(paper, tmp_path, measure, 100.0 / factor) as results:
        found = paper.translation.savings(results, measure, 25)
    assert len(found) == 25
    np.testing.assert_allclose(found, factor)


def test_a_search_that_never_gets_there_saves_nothing(paper, tmp_path):
    with planted(paper, tmp_path, "worse", 10.0) as results:
        # At the target the proxy's best are the worst.
        for trial in results["search", "target"]["trials"]:
            trial["loss"] = 30 - trial["loss"]
        assert set(paper.translation.savings(results, "loss", 25)) == {0.0}


def test_the_cost_of_a_search_is_that_of_its_trials(paper, tmp_path):
    with paper._results.Results(tmp_path / "cost.jsonl", {}) as results:
        trials = [{"hparams": {}, "loss": 1.0, "flops": 3.0, "metrics": {}}] * 2
        results.add(("search", "proxy"), {"trials": trials}, 1.0, 6.0)
        results.add(("trained", "target", 0), {"metrics": {"valid_loss": 1.0}}, 1.0, 100.0)
        rows = [paper._search.cost("c", results, "proxy", "target", 0, limit) for limit in (0.07, 0.05)]
        assert [row.holds for row in rows] == [True, False]
        assert rows[0].measured.startswith("6.0%")
        assert paper._search.values(results, "target", (0,), "valid_loss") == [1.0]
        assert paper._search.values(results, "target", (0, 1), "valid_loss") is None
        assert paper._search.best(results, "proxy") == {}
