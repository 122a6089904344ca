"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def tripwire() -> Iterator[None]:
    """A test whose process starts CUDA fails: a coordinator that did could no longer share its GPUs out."""

    def trip() -> None:
        pytest.fail("CUDA was started in the coordinator's process")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", trip)
        yield
