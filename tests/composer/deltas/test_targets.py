"""Targets of the config without tensors: those of another model, or of an adapter that lost tensors."""

import pytest
from peft import PeftModel

from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch
from composer.findings import Severity
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.formats.test_adapter import change_config, placed_on
from tests.composer.tiny import MakeAdapter, MakeModel, load_model


@pytest.mark.parametrize("config", [{}, {"layers_to_transform": [0, 1, 2]}, {"exclude_modules": ["k_proj"]}])
def test_a_target_of_other_models_is_a_notice_as_peft_ignores_it(
    config: dict[str, object], make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    others = ["w_pack", "k_proj"] if "exclude_modules" in config else ["w_pack"]
    change_config(adapter, target_modules=["q_proj", *others, "v_proj"], **config)
    for architecture in (open_checkpoint(base).architecture, None):
        placed = placed_on(adapter, architecture)
        findings = {(finding.code, finding.severity, finding.subject) for finding in placed.findings}
        assert findings == {("unused_target", Severity.NOTICE, other) for other in others}
        assert len(placed.modules) == 6
    assert len(load_deltas(adapter, open_checkpoint(base).architecture).deltas) == 6
    PeftModel.from_pretrained(load_model(base), adapter)


def test_a_target_that_is_an_error_says_what_to_do(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model()
    adapter = make_adapter(base)
    change_config(adapter, target_modules=["w_pack"])
    with pytest.raises(Mismatch, match="w_pack") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert caught.value.next_step.startswith("Remove the name from adapter_config.json")
