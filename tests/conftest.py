"""What all tests share."""

from collections import Counter
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, so that in the end no core waits for another one's.

    Those are the files whose tests start programs, and then those with many tests.
    """
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (not _starts_programs(item), -tests[item.path], item.path))


def _starts_programs(item: pytest.Item) -> bool:
    values = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    return any(getattr(v, "__module__", "") in ("tests.tiny_study", "tests.ray_cluster") for v in values)
