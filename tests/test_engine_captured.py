"""Recorded steps: with a recorder that replays on the processor, a training's numbers are the plain ones."""

import pytest
import torch

from bnbench.data import Arrays
from bnbench.engine import captured
from bnbench.engine.captured import WARM_CALLS, CudaRecorder, RecordedStep, chosen, recorder_for
from bnbench.engine.fleet import FleetClassifier
from bnbench.engine.rows import classifier_of
from bnbench.study.trial import Trial


class Replay:
    """Records as a CUDA graph does: nothing runs then, and a replay fills the same tensors each time."""

    def __init__(self):
        self.replays = 0

    def warm_up(self, work):
        return work()

    def record(self, work):
        # What the results look like, at the price of a run whose traces are wiped out.
        tensors = [*self.model_state()]
        before = [tensor.detach().clone() for tensor in tensors]
        random = torch.get_rng_state()
        losses, gradients = work()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        results = losses.detach().clone(), [gradient.clone() for gradient in gradients]

        def replay():
            self.replays += 1
            losses, gradients = work()
            results[0].copy_(losses.detach())
            for kept, gradient in zip(results[1], gradients, strict=True):
                kept.copy_(gradient)

        return replay, results

    model_state = staticmethod(lambda: ())


def member(row, number=0):
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(48, 1, 40, generator=draw)
    made = classifier_of(row.replace(seed=number), Arrays(x, torch.randint(10, (48,), generator=draw)))
    made.prepare()
    return made


def state_of(module):
    return {**dict(module.model.named_parameters()), **dict(module.model.named_buffers())}


def row(**changes):
    return Trial(model_options={"depth": 2, "width": 16}, batch_size=16, steps=12, **changes)


ROWS = {
    "batch": row(),
    "dropout": row(dropout=0.3),
    "clipped": row(clip_norm=0.5, weight_decay=1e-3),
    "reference": row(norm="virtual_batch", norm_options={"reference_size": 8}),
    "noisy": row(norm="noisy_batch"),
}


@pytest.fixture
def recorder(monkeypatch):
    replay = Replay()
    for home in ("chunked", "fleet"):
        monkeypatch.setattr(f"bnbench.engine.{home}.recorder_for", lambda device: replay)
    return replay


@pytest.mark.parametrize("trial", ROWS.values(), ids=ROWS)
def test_a_training_by_replays_has_the_bits_of_the_plain_one(trial, recorder, monkeypatch):
    together = member(trial)
    recorder.model_state = lambda: state_of(together).values()
    losses = torch.stack(together.do_steps(0, 6) + together.do_steps(6, 12))
    assert recorder.replays == 12 - WARM_CALLS
    monkeypatch.undo()
    plain = member(trial)
    assert torch.equal(losses, torch.stack(plain.do_steps(0, 12)))
    for name, tensor in state_of(plain).items():
        assert torch.equal(tensor, state_of(together)[name]), name


@pytest.mark.parametrize("name", ["batch", "dropout", "reference"])
def test_a_fleet_by_replays_has_the_bits_of_the_plain_one(name, recorder, monkeypatch):
    members = [member(ROWS[name], number) for number in range(3)]
    recorder.model_state = lambda: [tensor for one in members for tensor in state_of(one).values()]
    fleet = FleetClassifier(members)
    fleet.do_steps(0, 5)
    fleet.keep(members[1:])
    fleet.do_steps(5, 12)
    assert recorder.replays == 12 - 2 * WARM_CALLS
    monkeypatch.undo()
    plain = [member(ROWS[name], number) for number in range(3)]
    other = FleetClassifier(plain)
    other.do_steps(0, 5)
    other.keep(plain[1:])
    other.do_steps(5, 12)
    for one, two in zip(members, plain, strict=True):
        for key, tensor in state_of(two).items():
            assert torch.equal(tensor, state_of(one)[key]), key


def test_what_a_replay_would_leave_out_runs_as_it_is_written(recorder):
    hooked = member(ROWS["batch"])
    hooked.model.register_forward_hook(lambda *given: None)
    hooked.do_steps(0, 6)
    member(row(norm="frozen_batch", norm_options={"freeze_after": 0.5})).do_steps(0, 6)
    assert recorder.replays == 0


def test_losses_are_kept_and_gradients_are_overwritten():
    step = RecordedStep(lambda x: (x.sum(), [2 * x]), Replay())
    results = [step(torch.tensor([float(k)])) for k in range(5)]
    assert [float(loss) for loss, _ in results] == [0, 1, 2, 3, 4]
    assert results[3][1][0] is results[4][1][0]


def test_steps_are_recorded_on_a_gpu_where_the_environment_says_so(monkeypatch):
    assert recorder_for(torch.device("cuda")) is None
    monkeypatch.setenv("BNBENCH_CUDA_GRAPHS", "1")
    assert isinstance(recorder_for(torch.device("cuda")), CudaRecorder)
    assert recorder_for(torch.device("cpu")) is None
    assert chosen(None, captured.recorder_for, torch.nn.Identity()) is captured.recorder_for
