"""lm-evaluation-harness on a base in memory: resumed, with deltas that leave no trace."""

from pathlib import Path

import pytest

from composer.deltas.variants.load import load_deltas
from composer.errors import Interrupted
from composer.evaluation.model import load_model
from tests.composer.harness_tasks import CHOICES, write_task
from tests.composer.small_model import save_adapter, save_llama

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.mark.long
def test_a_task_that_is_interrupted_goes_on_at_the_request_where_it_stopped(tmp_path: Path) -> None:
    from composer.evaluation.harness import load_tasks, run_task
    from composer.evaluation.harness_model import AnswerJournal, HarnessModel

    write_task(tmp_path / "tasks", "colours", CHOICES, [0, 1, 2] * 20)
    loaded = load_model(save_llama(tmp_path / "base", seed=2), "cpu")
    save_adapter(load_model(tmp_path / "base", "cpu").model, tmp_path / "adapter", 5, r=2, target_modules=["q_proj"])
    deltas = load_deltas(tmp_path / "adapter", loaded.architecture).deltas
    (task,) = load_tasks(["colours"], tmp_path / "tasks").tasks.values()
    model, path, seen = HarnessModel(loaded), tmp_path / "journal.jsonl", list[tuple[int, int]]()
    alone = run_task(model, task, ())
    at_once = run_task(model, task, deltas, progress=lambda *at: seen.append(at))
    assert (seen[0], seen[-1]) == ((0, 180), (180, 180))
    assert at_once.examples != alone.examples

    def stop(done: int, _total: int) -> None:
        if done > 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_task(model, task, deltas, AnswerJournal(path, "it"), stop)
    path.write_bytes(path.read_bytes() + b'{"torn')
    answered = len(AnswerJournal(path, "it").known)
    assert 0 < answered < 180
    seen.clear()
    resumed = run_task(model, task, deltas, AnswerJournal(path, "it"), lambda *at: seen.append(at))
    assert seen[0] == (answered, 180)
    assert resumed.scores == at_once.scores
    assert AnswerJournal(path, "other weights").known == {}
    assert run_task(model, task, ()).scores == alone.scores, "the deltas are gone"
