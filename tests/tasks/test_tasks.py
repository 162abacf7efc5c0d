"""Every task has all that the protocol asks for."""

from __future__ import annotations

import pytest

from pipelines.core.task import Presentation, Task
from pipelines.tasks import TASKS, task_class


def members(protocol: type) -> list[str]:
    return [name for name in {**vars(protocol), **protocol.__annotations__} if not name.startswith("_")]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_all_of_the_protocol(name):
    kind = task_class(name)
    assert kind.name == name
    owners = {member: next((one for one in kind.__mro__ if member in vars(one)), None) for member in members(Task)}
    assert len(owners) > 30
    assert kind.__abstractmethods__ == set()
    # The constructor sets `config`.
    assert [member for member, owner in owners.items() if owner in (None, Task)] == ["config"]
    assert [member for member in members(Presentation) if not hasattr(kind.presentation, member)] == []
