"""Zero-shot accuracy: log-likelihoods by hand and by the harness itself, errors of differences, resumed runs."""

import json
import os
import re
import shutil
import sys

import pytest
import torch

import dcext
import fetch
from conftest import ROOT
from models import tiny_llama, transformers

datasets = pytest.importorskip("datasets")
harness = pytest.importorskip("lm_eval")
sys.path.append(str(ROOT / "bench"))

import zeroshot  # noqa: E402

import tasks  # noqa: E402

DOCS = [  # right, wrong, and one where only the normalized score is right, for `ShortestWins`
    {"goal": "g0", "sol1": "ab", "sol2": "abcd", "label": 0},
    {"goal": "g1", "sol1": "ab", "sol2": "abcd", "label": 1},
    {"goal": "g2", "sol1": "abcdefgh", "sol2": "x", "label": 0},
]


def byte_tokenizer():
    """One token per byte, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[
        :-1
    ]  # 255 of 256, for a vocabulary of 256
    vocabulary = {character: i for i, character in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sharp_llama():
    """With weights large enough that every token and its position matter."""
    return tiny_llama(initializer_range=0.3)


@pytest.fixture(scope="module")
def lm():
    return tasks.TreeLM(sharp_llama(), byte_tokenizer())


def instances(*pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def test_common_beginnings_are_read_once():
    tree = tasks.TokenTree()
    assert tree.add([7, 8, 9]) == [0, 1, 2]
    assert tree.add([7, 8, 5]) == [0, 1, 3]
    assert tree.add([8, 9]) == [4, 5]
    assert tree.tokens == [7, 8, 9, 5, 8, 9]
    assert tree.depths == [0, 1, 2, 2, 0, 1]
    expected = ["100000", "110000", "111000", "110100", "000010", "000011"]
    assert tree.visible().int().tolist() == [[int(c) for c in row] for row in expected]


@torch.inference_mode()
def by_hand(model, context, continuation):
    """One token after the other, each predicted from what stands before it alone."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        logits = model(torch.tensor([context + continuation[:i]])).logits[0, -1].double()
        total += float(logits[token] - logits.exp().sum().log())
        greedy &= int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("pack_tokens", [1, 12, 512])
def test_log_likelihood_by_hand(lm, monkeypatch, pack_tokens):
    monkeypatch.setattr(tasks, "PACK_TOKENS", pack_tokens)
    best, context = [], [3, 1, 4, 1, 5]
    with torch.inference_mode():
        for _ in range(3):
            best.append(int(lm.model(torch.tensor([context + best])).logits[0, -1].argmax()))
    pairs = [
        (context, best),
        (context, [*best[:2], 0]),
        (context, [2]),
        ([9], [2, 6, 5]),
        ([3], [1]),
    ]
    found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    expected = [by_hand(lm.model, *pair) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[0][1]
    for (ours, _), (hand, _) in zip(found, expected, strict=True):
        assert ours == pytest.approx(hand, rel=1e-5)


def test_log_likelihood_by_the_harness(lm):
    from lm_eval.models.huggingface import HFLM

    pairs = [
        ("What? ", "this"),
        ("What?", " that"),
        ("", "from nothing"),
        ("<end>a", "b"),
        ("x", " \xe9"),
    ]
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=2)
    expected = theirs.loglikelihood(instances(*pairs), disable_tqdm=True)
    found = lm.loglikelihood(instances(*pairs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close([v for v, _ in found], [v for v, _ in expected], rtol=1e-5, atol=0)


@pytest.mark.parametrize("ignored", [None, "attention_mask", "position_ids"])
def test_models_that_ignore_mask_or_positions_are_refused(lm, monkeypatch, ignored):
    def forward(**inputs):
        inputs.pop(ignored, None)
        return original(**inputs)

    original = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", forward)
    if ignored is None:
        assert lm.check() < 1e-4
    else:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM: expected .* at most 0\.3 nats"):
            lm.check()


def test_longest_request(lm, monkeypatch):
    monkeypatch.setattr(lm, "max_length", 4)
    assert len(lm._loglikelihood_tokens([(("", ""), [1, 2], [3, 4, 5])])) == 1
    for pair in (([1, 2, 3], [3, 4, 5]), ([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least 1 token each and 5 in all"):
            lm._loglikelihood_tokens([(("", ""), *pair)])


class ShortestWins(tasks.TreeLM):
    """Log-likelihood -1 and then -0.1 for each further character of the choice, which follows a space."""

    def _loglikelihood_tokens(self, requests, **kwargs):
        return [(-1 - 0.1 * (len(choice) - 2), False) for (_, choice), _, _ in requests]


def test_accuracies_are_those_of_the_harness(lm, monkeypatch):
    monkeypatch.setattr(tasks, "questions", lambda task: datasets.Dataset.from_list(DOCS))
    model = ShortestWins(lm.model, lm.tokenizer)
    assert tasks.score(model, "piqa", 3) == {"acc": "100", "acc_norm": "011"}
    assert tasks.score(model, "piqa", 2) == {"acc": "10", "acc_norm": "01"}
    with pytest.raises(ValueError, match="piqa: items: expected at most 3, got 4"):
        tasks.score(model, "piqa", 4)


def test_standard_errors():
    from lm_eval.api.metrics import mean_stderr

    first, other = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
    assert zeroshot.mean_stderr(first) == pytest.approx((0.5, mean_stderr(first)))
    models = {
        "a": {
            "p": {"correct": {"acc": "000000", "acc_norm": "110100"}},
            "w": {"correct": {"acc": "10"}},
        },
        "b": {
            "p": {"correct": {"acc": "000000", "acc_norm": "100110"}},
            "w": {"correct": {"acc": "11"}},
        },
    }
    rows = zeroshot.table_rows(models, "acc_norm")
    differences = mean_stderr([b - a for a, b in zip(first, other, strict=True)])
    cells = rows[1]["cells"]
    expected = {"value": 0.5, "stderr": mean_stderr(other), "difference": 0.0}
    assert cells["p"] == pytest.approx({**expected, "difference_stderr": differences})
    expected = {"value": 1.0, "stderr": 0.0, "difference": 0.5, "difference_stderr": 0.5}
    assert cells["w"] == pytest.approx(expected)
    assert cells["mean"]["value"] == pytest.approx(0.75)
    assert cells["mean"]["difference_stderr"] == pytest.approx((differences**2 + 0.25) ** 0.5 / 2)
    assert {cell["difference"] for cell in rows[0]["cells"].values()} == {0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model and what dcext makes of it."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = sharp_llama(), byte_tokenizer()
    model.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    dcext.compress_(model, dcext.CompressionConfig(recipe="int8"))
    dcext.save_pretrained(model, folder / "row", tokenizer)
    return {name: folder / name for name in ("float", "row")}


def command(folders, output):
    models = [f"--model={name}={folder}" for name, folder in folders.items()]
    return [*models, "--tasks=piqa", "--items=3", f"--output={output}"]


def test_an_interrupted_run_goes_on(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "questions", lambda task: datasets.Dataset.from_list(DOCS))
    output, load_model, loaded = tmp_path / "out.json", zeroshot.load_model, []

    def load(model):
        loaded.append(os.path.basename(model))
        if loaded == ["float", "row"]:
            raise KeyboardInterrupt
        return load_model(model)

    monkeypatch.setattr(zeroshot, "load_model", load)
    with pytest.raises(KeyboardInterrupt):
        zeroshot.main(command(folders, output))
    assert [e["label"] for e in json.loads(output.read_text())["results"].values()] == ["float"]
    zeroshot.main(command(folders, output))
    assert loaded == ["float", "row", "row"]
    report = json.loads(output.read_text())
    zeroshot.main(command(folders, output))
    assert loaded == ["float", "row", "row"]
    assert json.loads(output.read_text()) == report
    assert [row["label"] for row in report["table"]] == ["float", "row"]
    assert all(len(e["correct"]["acc"]) == 3 for e in report["results"].values())
    assert str(tmp_path) not in output.read_text()
    text = capsys.readouterr().out
    assert "piqa acc_norm" in text
    assert "- float" in text
    assert report["hardware"]["line"] in text


def test_results_belong_to_the_content_of_a_model(folders, tmp_path):
    copy = shutil.copytree(folders["row"], tmp_path / "elsewhere")
    digest = zeroshot.model_digest(str(folders["row"]))
    assert zeroshot.model_digest(str(copy)) == digest
    with open(copy / "config.json", "a") as file:
        file.write("\n")
    assert zeroshot.model_digest(str(copy)) != digest
    keys = {zeroshot.result_key(d, t, n) for d in "ab" for t in ("piqa", "sciq") for n in (2, 3)}
    assert len(keys) == 8


def test_compressed_layers_compute_in_float_only_meanwhile(folders):
    model, _ = zeroshot.load_model(str(folders["row"]))
    layers = [m for m in model.modules() if isinstance(m, dcext.DCLinear)]
    with zeroshot.float_activations(model):
        assert {layer.activations for layer in layers} == {"none"}
    assert {layer.activations for layer in layers} == {"int8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=x"], "expected LABEL=MODEL, got 'x'"),
        (["--model=a=x", "--model=a=y"], "expected different labels, got a, a"),
        (["--model=a=x", "--items=1"], "expected at least 2, got 1"),
        (["--model=a=x", "--tasks=piqa,other"], "expected some of piqa, .*, got 'other'"),
        (["--model=a=x", "--smoke", "--output=o"], "expected no --output"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        zeroshot.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_missing_models_are_named():
    with pytest.raises(SystemExit, match=r"error: /missing/m\.gguf: expected a folder, a \.gguf"):
        zeroshot.main(["--model=a=/missing/m.gguf"])


@pytest.mark.parametrize("content", ["[1]", "{}", '{"results": 1}', "text"])
def test_other_files_are_not_overwritten(folders, tmp_path, content):
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(SystemExit, match=r"out\.json: expected figures of bench/zeroshot\.py"):
        zeroshot.main(command(folders, tmp_path / "out.json"))


PROMPTS = {  # the first question of each set, and how many there are
    "piqa": (1838, "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"),
    "arc_easy": (570, "Question: Which technology was developed most recently?\nAnswer:"),
    "hellaswag": (10042, "Roof shingle removal: A man is sitting on a roof. He"),
    "winogrande": (1267, "Sarah was a much better surgeon than Maria so Sarah"),
    "openbookqa": (
        500,
        "Frilled sharks and angler fish live far beneath the surface of the ocean, ",
    ),
    "sciq": (
        1000,
        "\nQuestion: Who proposed the theory of evolution by natural selection?\nAnswer:",
    ),
}


@pytest.fixture(scope="module")
def real_questions():
    try:
        return fetch.tasks()
    except fetch.FetchError as error:
        pytest.skip(f"requires the questions: {error}")


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_questions_and_prompts(real_questions, task):
    count, prompt = PROMPTS[task]
    assert len(tasks.questions(task)) == count
    loaded = tasks.load_task(task, 2)
    loaded.build_all_requests()
    assert loaded.instances[0].args[0].startswith(prompt)
    assert all(choice.startswith(" ") for _, choice in (i.args for i in loaded.instances))


def test_smoke(real_questions, folders, capsys):
    models = [f"--model={name}={folder}" for name, folder in folders.items()]
    zeroshot.main(["--smoke", "--tasks=piqa,winogrande", *models])
    text = capsys.readouterr().out
    assert "smoke run" in text
    assert "winogrande acc " in text
    assert "zstd 1.5.7" in text
