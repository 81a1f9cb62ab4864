"""External reward models: tiny random ones in folders, read as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from reason.backbones.tokens import Tokens
from reason.datasets.problems import Problem
from reason.errors import ConfigError, DataError, RunError
from reason.methods.particle.config import ParticleConfig, Reading, RewardConfig
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import Potential
from reason.methods.particle.prm import (
    ProcessRewardModel,
    aggregate,
    load,
    open_prm,
)

CHARACTERS = ["<end>", "<step>", "<user>", "<model>", *"abcdefgh+-? \n0123456789=", "\n\n"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<model>{% else %}<user>{% endif %}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": len(CHARACTERS), "max_position_embeddings": 96, "initializer_range": 0.5, "pad_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
PROBLEM = Problem("p", "a+b?")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = {c: i for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>", "<step>", "<user>", "<model>"])
    return Tokens(tokenizer, 0, {"default": TEMPLATE})


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokens) -> dict[str, Path]:
    made = {}
    for kind, opener, labels in (
        ("tokens", transformers.AutoModelForTokenClassification, 2),
        ("causal", transformers.AutoModelForCausalLM, 0),
        ("sequence", transformers.AutoModelForSequenceClassification, 1),
        ("sequence3", transformers.AutoModelForSequenceClassification, 3),
    ):
        torch.manual_seed(len(made))
        config = transformers.LlamaConfig(**SIZES, **({"num_labels": labels} if labels else {}))
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        opener.from_config(config).save_pretrained(folder)
        tokens.save(folder)
    return made


def node(*chunks: str, finish: str = "") -> Node:
    found = Node(None)
    for i, text in enumerate(chunks):
        found = Node(found, list(text.encode()), text, finish=finish if i == len(chunks) - 1 else "")
    return found


def prefix(*chunks: str, finish: str = "") -> Prefix:
    return Prefix(PROBLEM, node(*chunks, finish=finish), None)  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    """Special tokens in it are special."""
    found, i = [], 0
    while i < len(text):
        token = next(t for t in sorted(CHARACTERS, key=len, reverse=True) if text.startswith(t, i))
        found.append(CHARACTERS.index(token))
        i += len(token)
    return found


def outputs(folder: Path, kind: str, text: str) -> torch.Tensor:
    with torch.no_grad():
        return (
            load(folder, "it", kind, torch.float32)
            .eval()(input_ids=torch.tensor([ids(text)]))
            .logits[0]
            .double()
        )


CHAT = "<user>a+b?<end><model>"
STEPS = ("ab\n\n", "cd\n\n", "8\n")
MARKED = Reading("tokens", separator="<step>")


def test_a_token_classifier_is_read_behind_each_step(folders):
    text = f"{CHAT}ab<step>cd<step>8<step>"
    x = outputs(folders["tokens"], "tokens", text)
    at = [i for i, token in enumerate(ids(text)) if token == 1]
    want = x[at].softmax(-1)[:, 1].numpy()
    model = open_prm(str(folders["tokens"]), MARKED).reward
    assert isinstance(model, ProcessRewardModel)
    np.testing.assert_allclose(1 / (1 + np.exp(-model.step_scores([prefix(*STEPS)])[0])), want, rtol=1e-5)
    for aggregation, value in (
        ("last", want[-1]),
        ("min", want.min()),
        ("mean", want.mean()),
        ("prod", want.prod()),
    ):
        one = open_prm(str(folders["tokens"]), Reading("tokens", aggregation, separator="<step>"))
        assert one([prefix(*STEPS)])[0] == pytest.approx(value, rel=1e-5)
    whole = open_prm(str(folders["tokens"]), Reading("tokens", "model", separator="<step>"))
    x = outputs(folders["tokens"], "tokens", f"{CHAT}ab\ncd\n8<step>")
    assert whole([prefix(*STEPS)])[0] == pytest.approx(float(x[-1].softmax(-1)[1]), rel=1e-5)


def test_labels_are_named_or_numbered(folders):
    one = open_prm(str(folders["tokens"]), Reading("tokens", separator="<step>", good="LABEL_0"))
    other = open_prm(str(folders["tokens"]), Reading("tokens", separator="<step>", good="1"))
    assert one([prefix("ab")])[0] == pytest.approx(1 - other([prefix("ab")])[0])
    with pytest.raises(ConfigError, match="Did you mean 'LABEL_1'"):
        open_prm(str(folders["tokens"]), Reading("tokens", separator="<step>", good="LABEL1"))
    with pytest.raises(ConfigError, match="3 labels: LABEL_0, LABEL_1, LABEL_2"):
        open_prm(str(folders["sequence3"]), Reading("sequence", "model"))
    three = open_prm(str(folders["sequence3"]), Reading("sequence", "model", good="LABEL_2"))
    x = outputs(folders["sequence3"], "sequence", f"{CHAT}ab")
    assert three([prefix("ab")])[0] == pytest.approx(float(x.softmax(-1)[2]), rel=1e-5)


def test_a_causal_model_is_read_at_the_token_that_means_right(folders):
    text = f"{CHAT}ab<step>cd<step>8<step>"
    x = outputs(folders["causal"], "causal", text)
    at = [i for i, token in enumerate(ids(text)) if token == 1]
    good, bad = CHARACTERS.index("+"), CHARACTERS.index("-")
    pair = open_prm(str(folders["causal"]), Reading("causal", "mean", "<step>", "+", "-"))
    assert pair([prefix(*STEPS)])[0] == pytest.approx(
        float(x[at][:, [good, bad]].softmax(-1)[:, 0].mean()), rel=1e-5
    )
    alone = open_prm(str(folders["causal"]), Reading("causal", "last", "<step>", "+"))
    assert alone([prefix(*STEPS)])[0] == pytest.approx(float(x[-1].softmax(-1)[good]), rel=1e-5)
    with pytest.raises(ConfigError, match="'good' is 4 tokens"):
        open_prm(str(folders["causal"]), Reading("causal", separator="<step>", good="good"))


def test_a_causal_model_answers_in_turns(folders):
    text = "<user>a+b? ab<end><model>+<end><user>cd<end><model>+<end><user>8<end><model>"
    x = outputs(folders["causal"], "causal", text)
    at = [i for i, token in enumerate(ids(text)) if CHARACTERS[token] == "<model>"]
    pair = [CHARACTERS.index("+"), CHARACTERS.index("-")]
    want = x[at][:, pair].softmax(-1)[:, 0]
    one = open_prm(str(folders["causal"]), Reading("causal", "min", "", "+", "-", turns=True))
    assert one([prefix(*STEPS)])[0] == pytest.approx(float(want.min()), rel=1e-5)
    assert len(one.reward.step_scores([prefix(*STEPS)])[0]) == 3


def test_a_sequence_classifier_reads_it_all(folders):
    one = open_prm(str(folders["sequence"]), Reading("sequence", "model", system="c"))
    several = [prefix(*STEPS[:k]) for k in (1, 2, 3)]
    texts = ["ab", "ab\ncd", "ab\ncd\n8"]
    want = [
        outputs(folders["sequence"], "sequence", f"<user>c<end>{CHAT}{t}").sigmoid().item() for t in texts
    ]
    np.testing.assert_allclose(one(several), want, rtol=1e-5)


def test_own_prompts_and_separators_that_are_text(folders):
    reading = Reading("tokens", "prod", separator="\n\n", prompt="b {problem}\n")
    x = outputs(folders["tokens"], "tokens", "b a+b?\nab\n\ncd\n\n")
    text = "b a+b?\nab\n\ncd\n\n"
    at = [i for i, token in enumerate(ids(text)) if CHARACTERS[token] == "\n\n"]
    want = float(x[at].softmax(-1)[:, 1].prod())
    assert open_prm(str(folders["tokens"]), reading)([prefix("ab\n\n", "cd\n\n")])[0] == pytest.approx(
        want, rel=1e-5
    )


def test_the_batch_makes_no_difference_and_what_was_read_is_not_read_again(folders):
    several = [prefix(*STEPS[:k], *["8\n"] * j) for k in (1, 2, 3) for j in range(4)]
    for kind, reading in (
        ("tokens", MARKED), ("causal", Reading("causal", "min", "<step>", "+", "-")), ("sequence", Reading("sequence", "model")),
    ):  # fmt: skip
        together = open_prm(str(folders[kind]), reading)
        single = ProcessRewardModel(together.reward.model, together.reward.tokens, reading, keep=0)
        alone = [single([one])[0] for one in several]
        np.testing.assert_allclose(together(several), alone, rtol=1e-4)
        read = together.reward.read
        again = [prefix(*STEPS[:k], *["8\n"] * j) for k in (1, 2, 3) for j in range(4)]
        assert (together(again) == together(several)).all() and together.reward.read == read
    cut = ProcessRewardModel(
        load(folders["tokens"], "it", "tokens", torch.float32),
        Tokens.from_folder(folders["tokens"]),
        MARKED,
        rows=2,
        keep=0,
    )
    np.testing.assert_allclose(cut(several), open_prm(str(folders["tokens"]), MARKED)(several), rtol=1e-4)
    assert cut.passes == 6


@pytest.mark.parametrize("keep", [256, 3])
@pytest.mark.parametrize("kind", ["tokens", "causal"])
def test_only_new_steps_are_read(folders, kind, keep):
    """A tree of prefixes, round by round: copies diverge, some lineages end, others are given up."""
    reading = Reading(kind, "min", "<step>", *(("+", "-") if kind == "causal" else ()))
    make = lambda keep: ProcessRewardModel(  # noqa: E731
        load(folders[kind], "it", kind, torch.float32), Tokens.from_folder(folders[kind]), reading, keep=keep
    )
    kept, whole = make(keep), make(0)
    assert kept._cache is not None and whole._cache is None
    rng = np.random.default_rng(0)
    problems = [PROBLEM, Problem("q", "c+d+e?")]
    rows = [(p, Node(None)) for p in problems for _ in range(3)]
    front, total = sum(len(kept._front(p.text)) for p in problems), 0
    for t in range(5):
        rows = [rows[i] for i in rng.integers(0, 3, 6) + np.repeat([0, 3], 3)]
        rows = [(p, n) if n.finished else (p, Node(n, [t, k], "abcdefgh"[: 1 + (t + k) % 8] + "\n\n", finish="eos" * (k == t)))
                for k, (p, n) in enumerate(rows)]  # fmt: skip
        prefixes = [Prefix(p, n, None) for p, n in rows if not (n.finished and n.step <= t)]  # type: ignore[arg-type]
        total += sum(len(p.node.text.strip()) + 1 for p in [*prefixes, prefixes[0]])
        prefixes.append(prefixes[0])
        np.testing.assert_allclose(kept(prefixes), whole(prefixes), rtol=1e-4)
        for a, b in zip(kept.step_scores(prefixes[:1]), whole.step_scores(prefixes[:1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(kept._cache._slot) == len(kept._kept) <= keep  # no row is lost
    if keep == 256:
        assert kept.read <= front + total + 5 * 9  # and those of ``step_scores`` that were finished
        assert kept.read < whole.read / 2


def test_text_that_looks_like_a_separator_is_text(folders):
    """A policy that writes <step> gains no step, nor ends one."""
    model = open_prm(str(folders["tokens"]), MARKED).reward
    assert len(model.step_scores([prefix("ab<step>cd\n\n", "8")])[0]) == 2


def test_a_chunk_of_nothing_is_no_step(folders):
    model = open_prm(str(folders["tokens"]), MARKED).reward
    plain, ended = model.step_scores([prefix("ab\n\n"), prefix("ab\n\n", "", finish="eos")])
    np.testing.assert_allclose(plain, ended, rtol=1e-5)
    (empty,) = model.step_scores([prefix("", finish="eos")])
    assert len(empty) == 1


def test_separators_that_the_tokenizer_joins_with_the_next_step_are_an_error(folders, tokens):
    model = load(folders["tokens"], "it", "tokens", torch.float32)
    joining = tokens.copy()
    joining.tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\nc|[\s\S]"), "isolated")
    one = ProcessRewardModel(model, joining, Reading("tokens", separator="\n"))
    assert len(one.step_scores([prefix("a\n", "b\n")])[0]) == 2
    with pytest.raises(RunError, match=r"scores 2 of 3 steps of problem 'p' at step 3: its tokenizer joins"):
        one([prefix("a\n", "cd\n", "8\n")])


def test_damaged_weights_and_long_solutions_name_problem_and_step(folders):
    model = load(folders["tokens"], "it", "tokens", torch.float32)
    with torch.no_grad():
        model.score.weight[1, 0] = float("nan")
    broken = ProcessRewardModel(model, Tokens.from_folder(folders["tokens"]), MARKED)
    with pytest.raises(RunError, match=r"gave nan for problem 'p', step 1"):
        broken([prefix(*STEPS)])
    with pytest.raises(
        DataError, match=r"Problem 'p' and its solution have \d+ tokens at step 30; .* reads 96"
    ):
        open_prm(str(folders["tokens"]), MARKED)([prefix(*["abc\n\n"] * 30)])


def test_a_model_without_the_head_is_refused(folders, tmp_path):
    with pytest.raises(DataError, match=r"has no weights named score.*kind 'tokens'"):
        open_prm(str(folders["causal"]), MARKED)
    with pytest.raises(DataError, match="There is no"):
        open_prm(str(tmp_path / "nothing"), MARKED)


def test_sure_scores_do_not_become_one(folders):
    model = load(folders["tokens"], "it", "tokens", torch.bfloat16)
    with torch.no_grad():
        model.score.bias.copy_(torch.tensor([0.0, 12.0]))
    got = ProcessRewardModel(model, Tokens.from_folder(folders["tokens"]), MARKED)([prefix("ab")])
    assert 0.999 < got[0] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "token"}, "Did you mean 'tokens'"),
        ({"aggregation": "least"}, "Unknown aggregation"),
        ({"kind": "sequence", "aggregation": "min"}, "one score for a whole solution"),
        ({"kind": "causal"}, "none is named"),
        ({"turns": True}, "Turns for each step"),
        ({"separator": ""}, "separator behind a step is empty"),
        ({"prompt": "Solve it."}, "lacks {problem}"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Reading(**options)


def test_products_and_minima_weigh_by_their_ratios_alone():
    def weighed(aggregation: str, potential: str) -> ParticleConfig:
        prm = Reading(aggregation=aggregation, source="/a")
        return ParticleConfig(potential=potential, reward=RewardConfig(kind="prm", prm=prm))

    for aggregation in ("prod", "min"):
        weighed(aggregation, "ratio")
        for potential in ("prob", "logit", "exp"):
            with pytest.raises(ConfigError, match="ratio"):
                weighed(aggregation, potential)
    weighed("last", "logit")
    z = np.log(np.array([0.9, 0.5, 0.8]) / (1 - np.array([0.9, 0.5, 0.8])))
    for aggregation, want in (("prod", [0.9, 0.5, 0.8]), ("min", [0.9, 0.5 / 0.9, 1.0])):
        path = Node(None)
        for t in range(3):
            path = Node(path, [t], "")
            path.reward = aggregate(z[: t + 1], aggregation)
            assert Potential("ratio", clip=0.0)(path) == pytest.approx(np.log(want[t]))
