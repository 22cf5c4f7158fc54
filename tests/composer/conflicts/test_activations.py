"""Activation interference against the dense products that it represents."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from composer.conflicts.evidence.activations import activation_interference, activations
from composer.conflicts.examine import parse_prompts
from composer.deltas.delta import Delta, Layout, LowRank, Replacement
from composer.deltas.variants.load import load_deltas
from composer.errors import InvalidFile, Mismatch, NotSupported
from composer.evaluation.hooks import deltas_applied
from composer.evaluation.measure import Encoded, encode_prompt
from composer.evaluation.model import LoadedModel, load_model
from tests.composer.adapted import save_adapted
from tests.composer.deltas.test_variants_experts import DOWN, GATE, lora, qwen3, save_base
from tests.composer.small_model import save_gemma, save_gpt2, save_tokenizer
from tests.device import DEVICE

PROMPTS = ["who are you", "abc", "is 12 or 3"]


def deltas(seed: int, modules: list[str], size: float = 0.2, layout: Layout = Layout.LINEAR) -> list[Delta]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 48), "c_attn": (96, 32)}
    return [
        LowRank(
            module=module, weight=f"{module}.weight", layout=layout,
            A=torch.randn(3, shapes[module.rpartition(".")[2]][1], generator=generator),
            B=torch.randn(shapes[module.rpartition(".")[2]][0], 3, generator=generator), scale=size,
        )
        for module in modules
    ]  # fmt: skip


def encoded(loaded: LoadedModel) -> list[Encoded]:
    return [Encoded(tuple(encode_prompt(loaded, prompt, True)), 1) for prompt in PROMPTS]


MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


def captured(loaded: LoadedModel, victim: list[Delta]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The inputs of each module with the victim active, and the outputs that its own weight makes of them."""
    inputs: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES}
    handles = [
        loaded.model.get_submodule(module).register_forward_pre_hook(
            lambda _module, given, module=module: inputs[module].append(given[0][0])
        )
        for module in MODULES
    ]
    with torch.inference_mode(), deltas_applied(loaded.model, victim):
        for example in encoded(loaded):
            loaded.model(input_ids=torch.tensor([example.ids], device=loaded.device))
    for handle in handles:
        handle.remove()
    both: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in MODULES:
        X_NI = torch.cat(inputs[module]).cpu().double()
        both[module] = X_NI, X_NI @ loaded.model.get_submodule(module).weight.cpu().double().T
    return both


def test_ratio_along_and_across_are_those_of_the_dense_products(loaded: LoadedModel) -> None:
    victim, intruder = deltas(1, MODULES[:2]), deltas(2, MODULES[1:], size=0.5)
    measured = activation_interference(loaded, encoded(loaded), victim, intruder)
    own = other = common = 0.0
    for module, (X_NI, Y_NO) in captured(loaded, victim).items():
        moved = [
            sum((X_NI @ (d.scale * d.B_OR @ d.A_RI).double().T for d in adapter if d.module == module), torch.zeros(()))
            for adapter in (victim, intruder)
        ]
        base = Y_NO.square().sum()
        own += (moved[0].square().sum() / base).item()
        other += (moved[1].square().sum() / base).item()
        common += ((moved[0] * moved[1]).sum() / base).item()
    assert measured.ratio == pytest.approx((other / own) ** 0.5, rel=1e-4)
    assert measured.along == pytest.approx(common / own, rel=1e-3, abs=1e-5)
    assert measured.across == pytest.approx((other / own - (common / own) ** 2) ** 0.5, rel=1e-4)
    assert sum(measured.modules.values()) == pytest.approx(1.0)
    assert measured.modules[MODULES[0]] == pytest.approx(0.0), "the intruder does nothing there"


def test_an_adapter_beside_itself_moves_activations_as_far_and_in_its_own_direction(loaded: LoadedModel) -> None:
    own = deltas(1, MODULES)
    measured = activation_interference(loaded, encoded(loaded), own, own)
    assert (measured.ratio, measured.along) == pytest.approx((1.0, 1.0))
    assert measured.across == pytest.approx(0.0, abs=1e-3)
    opposite = [replace(delta, scale=-2 * delta.scale) for delta in own if isinstance(delta, LowRank)]
    against = activation_interference(loaded, encoded(loaded), own, opposite)
    assert (against.ratio, against.along) == pytest.approx((2.0, -2.0))


def test_a_victim_that_does_nothing_has_nothing_to_lose(loaded: LoadedModel) -> None:
    measured = activation_interference(loaded, encoded(loaded), [], deltas(2, MODULES))
    assert (measured.ratio, measured.along, measured.across) == (0.0, 0.0, 0.0)
    assert measured.intruder > 0
    nothing = activation_interference(loaded, encoded(loaded), [], [])
    assert (nothing.ratio, nothing.modules) == (0.0, {})


def test_every_ordered_pair_is_measured_with_its_own_victim_active(loaded: LoadedModel) -> None:
    members = {name: deltas(seed, MODULES, size=seed / 10) for seed, name in enumerate(("a", "b", "c"), start=1)}
    measured = activations(loaded, members, PROMPTS)
    assert set(measured.directed) == {(v, i) for v in members for i in members if v != i}
    direct = activation_interference(loaded, encoded(loaded), members["b"], members["c"])
    assert measured.directed["b", "c"].ratio == pytest.approx(direct.ratio, rel=1e-4)
    victim, worst = measured.worse("a", "c")
    assert (victim, worst) == ("a", measured.directed["a", "c"]), "c is three times as strong"


def test_a_pairs_activations_do_not_depend_on_the_others_in_the_set(loaded: LoadedModel) -> None:
    pair = {"a": deltas(1, MODULES[:1]), "b": deltas(2, MODULES[:2])}
    alone = activations(loaded, pair, PROMPTS)
    beside = activations(loaded, {"c": deltas(3, MODULES[1:], size=0.5), **pair}, PROMPTS)
    for names, expected in alone.directed.items():
        measured = beside.directed[names]
        for number in ("ratio", "along", "across", "victim", "intruder"):
            assert getattr(measured, number) == pytest.approx(getattr(expected, number), rel=1e-4), number
        assert measured.modules == pytest.approx(expected.modules)


def test_embeddings_and_transposed_weights_count_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    gpt2 = load_model(save_gpt2(tmp_path_factory.mktemp("gpt2")), device=DEVICE)
    own = deltas(1, ["transformer.h.0.attn.c_attn"], layout=Layout.CONV1D)
    vocabulary = gpt2.model.config.vocab_size
    embedding = LowRank(
        module="transformer.wte",
        weight="transformer.wte.weight",
        layout=Layout.EMBEDDING,
        A=torch.randn(2, vocabulary),
        B=torch.randn(32, 2),
        scale=0.1,
    )
    measured = activations(gpt2, {"one": own, "two": [*own, embedding]}, PROMPTS)
    assert set(measured.directed["one", "two"].modules) == {"transformer.h.0.attn.c_attn", "transformer.wte"}
    assert measured.directed["one", "two"].along == pytest.approx(1.0)
    assert measured.directed["one", "two"].across > 0


@pytest.mark.parametrize("memory", [None, 20_000], ids=["in memory", "streamed"])
def test_an_embedding_that_scales_what_it_looks_up_scales_what_an_adapter_adds(
    tmp_path: Path, memory: int | None
) -> None:
    gemma = load_model(save_gemma(tmp_path / "gemma"), device="cpu", memory=memory)
    assert gemma.streamed is (memory is not None)
    path, vocabulary = "model.embed_tokens", gemma.model.config.vocab_size
    torch.manual_seed(0)
    own = LowRank(
        module=path,
        weight=f"{path}.weight",
        layout=Layout.EMBEDDING,
        A=torch.randn(2, vocabulary),
        B=torch.randn(32, 2),
        scale=0.1,
    )
    ids, embedding = (
        torch.cat([torch.tensor(example.ids) for example in encoded(gemma)]),
        gemma.model.get_submodule(path),
    )
    with torch.inference_mode():
        before = embedding(ids)
        with deltas_applied(gemma.model, [own]):
            moved = embedding(ids) - before
    expected = (moved.square().sum() / before.square().sum()).sqrt().item()
    measured = activation_interference(gemma, encoded(gemma), [own], [own])
    assert (measured.victim, measured.intruder) == pytest.approx((expected, expected), rel=1e-4)


def test_nothing_stays_on_the_model(loaded: LoadedModel) -> None:
    activations(loaded, {"a": deltas(1, MODULES), "b": deltas(2, MODULES)}, PROMPTS)
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_no_prompts_and_a_module_that_is_missing_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(Mismatch, match="at least one prompt"):
        activations(loaded, {"a": deltas(1, MODULES), "b": []}, [])
    lost = [replace(delta, module="model.layers.9.self_attn.q_proj") for delta in deltas(1, MODULES[:1])]
    with pytest.raises(Mismatch, match=r"model\.layers\.9"):
        activations(loaded, {"a": lost, "b": []}, PROMPTS)


def test_prompts_are_lines_and_empty_ones_are_none() -> None:
    assert parse_prompts("one\n\n  \ntwo\n") == ["one", "two"]
    for text in ("", "\n \n", "x\n" * 1001, "one\n" + "x" * 100_001):
        with pytest.raises(InvalidFile, match="prompts"):
            parse_prompts(text)


@pytest.fixture(scope="module")
def streamed(loaded: LoadedModel) -> LoadedModel:
    """The same base, of which only the embedding and one layer fit into the given memory."""
    measured = load_model(loaded.model.name_or_path, device="cpu", memory=60_000)
    assert measured.streamed
    assert any(parameter.is_meta for parameter in measured.model.parameters())
    return measured


def test_a_base_that_does_not_fit_in_memory_is_streamed_and_shows_the_same(
    loaded: LoadedModel, streamed: LoadedModel
) -> None:
    members = {"a": deltas(0, MODULES), "b": deltas(1, MODULES[:2])}
    here, there = activations(loaded, members, PROMPTS), activations(streamed, members, PROMPTS)
    for pair, one in here.directed.items():
        assert there.directed[pair].intruder == pytest.approx(one.intruder, rel=1e-5)
        assert there.directed[pair].ratio == pytest.approx(one.ratio, rel=1e-5)
        assert there.directed[pair].modules == pytest.approx(one.modules, rel=1e-5)
    assert any(parameter.is_meta for parameter in streamed.model.parameters()), "what was read is given back"


def test_prompts_of_different_lengths_share_the_reading_of_a_streamed_base(streamed: LoadedModel) -> None:
    passes: list[tuple[int, ...]] = []
    layer = streamed.model.get_submodule("model.layers.1.mlp")
    handle = layer.register_forward_pre_hook(lambda _module, given: passes.append(tuple(given[0].shape[:2])))
    activations(streamed, {"a": deltas(0, MODULES), "b": deltas(1, MODULES)}, PROMPTS)
    handle.remove()
    assert [rows for rows, _ in passes] == [len(PROMPTS)] * 2, "one pass for each victim"


def test_a_delta_that_changes_a_weight_as_a_whole_is_refused_on_a_streamed_base(streamed: LoadedModel) -> None:
    name = "model.layers.1.mlp.down_proj"
    replacement = Replacement(module=name, weight=f"{name}.weight", tensor=torch.zeros(32, 48))
    with pytest.raises(NotSupported, match="does not fit in memory") as caught:
        activations(streamed, {"a": [replacement], "b": deltas(1, MODULES)}, PROMPTS)
    assert caught.value.subject == name


def test_fused_experts_act_and_are_not_looked_at(tmp_path: Path) -> None:
    """None of the model's modules is one of them; the attention beside them is still measured."""
    base = save_base(qwen3(), tmp_path / "base")
    save_tokenizer(base)
    model = load_model(base, device=DEVICE)
    members = {
        name: load_deltas(save_adapted(base, lora(GATE, DOWN), tmp_path / name, seed), model.architecture).deltas
        for seed, name in enumerate(("red", "green"))
    }
    measured = activations(model, members, PROMPTS).directed["red", "green"]
    assert sorted(measured.modules) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    alone = {name: [delta for delta in own if "q_proj" in delta.module] for name, own in members.items()}
    assert measured.ratio != pytest.approx(activations(model, alone, PROMPTS).directed["red", "green"].ratio, rel=1e-6)
