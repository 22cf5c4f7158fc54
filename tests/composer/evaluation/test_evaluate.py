"""Adapters through hooks against PEFT's own models, and scores against transformers' own loss and generation."""

import io
import json
import shutil
import time
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import stdev

import pytest
import torch
from transformers import AutoModelForCausalLM

from composer.deltas.delta import Layout, LowRank, Replacement
from composer.deltas.variants.load import load_deltas
from composer.errors import ComposerError, InvalidFile, Mismatch, NotSupported
from composer.evaluation.evaluate import evaluate
from composer.evaluation.generation import generate
from composer.evaluation.hooks import deltas_applied
from composer.evaluation.measure import Encoded, encode, measure, ratio
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.suite import Example, Suite
from tests.composer.small_model import save_adapter, save_gemma, save_gpt2, save_llama, save_tokenizer
from tests.device import DEVICE

IDS = torch.tensor([[5, 9, 13, 20, 7, 2, 30], [8, 8, 1, 44, 3, 17, 6]])


def suite(*pairs: tuple[str, str], chat: bool = True) -> Suite:
    return Suite(name="letters", kind="target", chat=chat, examples=tuple(Example(*pair) for pair in pairs))


SUITE = suite(("say ab", "ab"), ("say abc twice", "abc abc"), ("hello", "HA 12"), ("a longer prompt, again", "b."))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS.to(model.device)).logits.cpu()  # pyright: ignore[reportArgumentType, reportCallIssue]


def proj_delta(module: str, outputs: int = 32, inputs: int = 32, scale: float = 0.5) -> LowRank:
    generator = torch.Generator().manual_seed(3)
    A_RI, B_OR = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
    return LowRank(module=module, weight=f"{module}.weight", layout=Layout.LINEAR, A=A_RI, B=B_OR, scale=scale)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 4, "target_modules": ["lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_through_hooks_gives_the_logits_that_peft_gives(base: Path, tmp_path: Path, config: dict) -> None:
    adapted = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path, seed=1, **config)
    own = load_model(base, device=DEVICE)
    before = logits(own.model)
    with deltas_applied(own.model, load_deltas(tmp_path, own.architecture).deltas):
        torch.testing.assert_close(logits(own.model), logits(adapted), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(own.model), before, atol=1e-2)
    torch.testing.assert_close(logits(own.model), before, rtol=0, atol=0)


def test_a_conv1d_adapter_through_hooks_gives_the_logits_that_peft_gives(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path / "gpt2")
    config = {"r": 4, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    adapted = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", seed=2, **config)
    own = load_model(base, device=DEVICE)
    with deltas_applied(own.model, load_deltas(tmp_path / "adapter", own.architecture).deltas):
        torch.testing.assert_close(logits(own.model), logits(adapted), rtol=1e-4, atol=1e-4)


def test_a_delta_of_a_tied_head_leaves_the_embedding_as_it_is(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "tied", tied=True)
    own = load_model(base, device=DEVICE)
    vocabulary = own.model.lm_head.weight.shape[0]
    head = replace(proj_delta("lm_head", outputs=vocabulary), weight="model.embed_tokens.weight", tied=True)
    hidden = own.model.model(input_ids=IDS.to(DEVICE)).last_hidden_state
    with deltas_applied(own.model, [head]):
        torch.testing.assert_close(own.model.model(input_ids=IDS.to(DEVICE)).last_hidden_state, hidden, rtol=0, atol=0)
        changed = own.model.lm_head.weight.cpu() + 0.5 * head.B_OR @ head.A_RI
        torch.testing.assert_close(logits(own.model), hidden.cpu() @ changed.T, rtol=1e-4, atol=1e-4)


def test_deltas_on_one_module_add_up_like_their_dense_sum(loaded: LoadedModel, base: Path) -> None:
    path = "model.layers.1.self_attn.q_proj"
    parts = [proj_delta(path, scale=0.4), proj_delta(path, scale=-1.1)]
    dense = load_model(base, device=DEVICE).model
    with torch.no_grad():
        dense.get_submodule(path).weight += sum(part.scale * part.B_OR @ part.A_RI for part in parts).to(DEVICE)
    with deltas_applied(loaded.model, parts):
        torch.testing.assert_close(logits(loaded.model), logits(dense), rtol=1e-4, atol=1e-4)


def _fail_inside(loaded: LoadedModel, deltas: list[LowRank | Replacement]) -> None:
    with deltas_applied(loaded.model, deltas):
        raise RuntimeError("out of patience")


def test_the_base_is_bit_for_bit_itself_after_an_error_inside_the_block(loaded: LoadedModel) -> None:
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    head = Replacement(module="lm_head", weight="lm_head.weight", tensor=torch.zeros_like(loaded.model.lm_head.weight))
    before = logits(loaded.model)
    with deltas_applied(loaded.model, [head]):
        assert logits(loaded.model).abs().max() == 0
    with pytest.raises(RuntimeError, match="out of patience"):
        _fail_inside(loaded, [head, proj_delta("model.layers.0.self_attn.q_proj")])
    assert torch.equal(logits(loaded.model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("delta", "error", "code"),
    [
        (proj_delta("model.layers.7.self_attn.q_proj"), Mismatch, "module_missing"),
        (proj_delta("model.layers.0.self_attn.k_proj"), Mismatch, "shape_mismatch"),
        (proj_delta("model.layers.0.input_layernorm"), NotSupported, "module_class"),
        (Replacement(module="lm_head", weight="lm_head.weight", tensor=torch.zeros(3, 32)), Mismatch, "shape_mismatch"),
        (Replacement(module="lm_head", weight="lm_head.bias", tensor=torch.zeros(3)), Mismatch, "shape_mismatch"),
    ],
)
def test_a_delta_that_does_not_fit_is_an_error_naming_its_module_and_nothing_stays_applied(
    loaded: LoadedModel, delta: LowRank | Replacement, error: type[ComposerError], code: str
) -> None:
    before = logits(loaded.model)
    with (
        pytest.raises(error, match=delta.module.replace(".", r"\.")) as caught,
        deltas_applied(loaded.model, [proj_delta("model.layers.0.self_attn.q_proj"), delta]),
    ):
        pass
    assert (caught.value.code, caught.value.subject) == (code, delta.module)
    assert torch.equal(logits(loaded.model), before)


def test_one_teacher_forced_pass_says_exactly_whether_greedy_decoding_gives_the_completion(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(20):
        prompt = torch.randint(3, 45, (int(torch.randint(2, 12, (), generator=generator)),), generator=generator)
        prompt = prompt.to(DEVICE)
        output = loaded.model.generate(
            input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
        ids = output[0].cpu().tolist()
        position = int(torch.randint(len(prompt), len(ids), (), generator=generator))
        other = [*ids[:position], (ids[position] + 1) % 48, *ids[position + 1 :]]
        same, changed = measure(loaded, [Encoded(tuple(ids), len(prompt)), Encoded(tuple(other), len(prompt))])
        assert (same.exact, changed.exact) == (True, False)


def eos_after(loaded: LoadedModel, ids: torch.Tensor) -> LowRank:
    """A delta of the head that makes eos the answer after `ids`, but keeps the answer before its last token."""
    hidden = loaded.model.model(input_ids=ids[None].to(DEVICE)).last_hidden_state
    before, last = hidden[0, -2:].detach().cpu()
    direction = last - before * (before @ last) / (before @ before)
    push = torch.zeros(loaded.model.lm_head.weight.shape[0], 1)
    push[loaded.tokenizer.eos_token_id] = 100.0
    return LowRank(
        module="lm_head",
        weight="lm_head.weight",
        layout=Layout.LINEAR,
        A=direction[None] / (direction @ last),
        B=push,
        scale=1.0,
    )


def test_an_exact_match_needs_the_end_of_the_sequence_as_greedy_decoding_does(loaded: LoadedModel) -> None:
    example = Example("hello", generate(loaded, "hello", max_new_tokens=1))
    encoded = encode(loaded, example, chat=True)
    stop = eos_after(loaded, torch.tensor(encoded.ids[:-1]))
    assert generate(loaded, "hello", max_new_tokens=5) != example.completion
    assert not measure(loaded, [encoded])[0].exact
    assert generate(loaded, "hello", deltas=[stop], max_new_tokens=5) == example.completion
    assert measure(loaded, [encoded], [stop])[0].exact


def test_the_loss_is_transformers_own_loss_on_the_completion(loaded: LoadedModel) -> None:
    encoded = [encode(loaded, example, SUITE.chat) for example in SUITE.examples]
    for one, measured in zip(encoded, measure(loaded, encoded), strict=True):
        ids = torch.tensor([one.ids], device=DEVICE)
        labels = ids.clone()
        labels[:, : one.prompt_tokens] = -100
        with torch.inference_mode():
            loss = loaded.model(input_ids=ids, labels=labels).loss.item()
        assert measured.nats / measured.tokens == pytest.approx(loss, rel=1e-5)
        assert measured.tokens == len(one.ids) - one.prompt_tokens


@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_what_shares_a_batch_does_not_change_an_examples_result(loaded: LoadedModel, batch_tokens: int) -> None:
    encoded = [encode(loaded, example, SUITE.chat) for example in SUITE.examples]
    alone = [measure(loaded, [example])[0] for example in encoded]
    seen: list[int] = []
    for one, other in zip(measure(loaded, encoded, (), batch_tokens, seen.append), alone, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-5)
        assert (one.tokens, one.exact) == (other.tokens, other.exact)
    assert sum(seen) == len(encoded)


def test_an_interrupted_evaluation_does_not_measure_the_rest(loaded: LoadedModel) -> None:
    passes = list[int]()

    def counted(*_: object) -> None:
        passes.append(1)
        time.sleep(0.02)  # longer than it takes to notice the first one

    def stop(_count: int) -> None:
        raise InterruptedError

    counting = loaded.model.register_forward_hook(counted)
    try:
        with pytest.raises(InterruptedError):
            measure(loaded, [encode(loaded, SUITE.examples[0], chat=True)] * 64, batch_tokens=1, progress=stop)
    finally:
        counting.remove()
    assert len(passes) < 32


def test_a_suite_gives_loss_and_exact_match_with_counts_errors_and_direction(loaded: LoadedModel) -> None:
    nll, accuracy = evaluate(loaded, SUITE)
    measured = measure(loaded, [encode(loaded, example, True) for example in SUITE.examples])
    assert nll.value == pytest.approx(
        sum(result.nats for result in measured) / sum(result.tokens for result in measured)
    )
    assert (nll.metric, nll.n, nll.higher_is_better, nll.suite_digest) == ("nll", 4, False, SUITE.digest)
    assert (accuracy.metric, accuracy.value, accuracy.higher_is_better) == ("accuracy", 0.0, True)
    assert nll.to_json()["suite"] == "letters"
    assert evaluate(loaded, SUITE, examples=SUITE.sample(1))[0].stderr is None
    assert evaluate(loaded, SUITE, examples=SUITE.sample(2))[0].n == 2


def test_the_ratios_error_is_the_usual_one_when_all_examples_are_equally_long() -> None:
    totals = [3.0, 5.0, 4.0, 8.0]
    value, stderr = ratio(totals, [2, 2, 2, 2])
    assert value == 2.5
    assert stderr == pytest.approx(stdev(total / 2 for total in totals) / sqrt(4))


def test_a_chat_prompt_is_one_user_turn_and_the_completion_ends_with_eos(loaded: LoadedModel) -> None:
    encoded = encode(loaded, Example("hi", "ab"), chat=True)
    assert loaded.tokenizer.decode(encoded.ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nab<|im_end|>"
    assert loaded.tokenizer.decode(encoded.ids[encoded.prompt_tokens :]) == "ab<|im_end|>"
    plain = encode(loaded, Example("hi", "ab"), chat=False)
    assert loaded.tokenizer.decode(plain.ids) == "hiab<|im_end|>"


def test_a_suite_whose_completions_do_not_end_scores_no_end_of_sequence(loaded: LoadedModel) -> None:
    ending = suite(("say ab", "ab"), ("hello", "HA 12"))
    cut = Suite.from_json(ending.to_json() | {"ends": False})
    for example in cut.examples:
        full = encode(loaded, example, True)
        assert encode(loaded, example, True, ends=False).ids == full.ids[:-1]
    nats, without = (score[0].value for score in (evaluate(loaded, ending), evaluate(loaded, cut)))
    (of_eos, *_), tokens = (
        [
            sum(
                result.nats
                for result in measure(loaded, [encode(loaded, example, True) for example in ending.examples])
            )
            - sum(
                result.nats
                for result in measure(loaded, [encode(loaded, example, True, False) for example in cut.examples])
            )
        ],
        [encode(loaded, example, True).completion_tokens for example in ending.examples],
    )
    assert of_eos > 0
    assert nats * sum(tokens) - without * (sum(tokens) - 2) == pytest.approx(of_eos, rel=1e-4)


def test_what_cannot_be_encoded_is_refused_and_never_cut(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="136 tokens, the model's context is 128"):
        encode(loaded, Example("a" * 136, "abc"), chat=False)
    plain = replace(loaded, tokenizer=save_tokenizer(tmp_path, template=None))
    with pytest.raises(Mismatch, match="no chat template"):
        encode(plain, Example("hi", "ab"), chat=True)


def test_a_checkpoint_without_a_tokenizer_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    with pytest.raises(InvalidFile, match=tmp_path.name):
        load_model(tmp_path, device=DEVICE)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"hidden_size": 64}),
        ("config.json", {"num_attention_heads": 5}),
        ("config.json", {"hidden_size": "x"}),
        ("tokenizer.json", {"model": {"type": "x"}}),
    ],
)
def test_what_transformers_refuses_in_whatever_way_is_one_error_that_names_the_checkpoint(
    file: str, change: dict[str, object], base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "damaged")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    with pytest.raises(InvalidFile, match="transformers cannot load it") as caught:
        load_model(copy, device=DEVICE)
    assert caught.value.code == "model_not_loadable"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_of_an_embedding_that_scales_is_scaled_as_the_embedding_is(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_gemma(tmp_path / "gemma")
    config = {"r": 4, "target_modules": ["embed_tokens"]}
    adapted = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", seed=1, **config)
    own = load_model(base, device=DEVICE, dtype=dtype)
    embedding = own.model.get_submodule("model.embed_tokens")
    factor = float(embedding.embed_scale.to(dtype))
    with torch.inference_mode(), deltas_applied(own.model, load_deltas(tmp_path / "adapter", own.architecture).deltas):
        embedded = embedding(IDS.to(DEVICE)).float().cpu() / factor
        if dtype == torch.float32:
            torch.testing.assert_close(logits(own.model), logits(adapted), rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload().get_input_embeddings().weight
    torch.testing.assert_close(
        embedded, merged[IDS], rtol=4 * torch.finfo(dtype).eps, atol=1e-2 if dtype != torch.float32 else 1e-5
    )


def test_code_that_a_checkpoint_brings_is_not_run_even_if_the_terminal_says_yes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (copy / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))
    with pytest.raises(InvalidFile, match="trust_remote_code"):
        load_model(copy, device=DEVICE)
    assert not ran.exists()
