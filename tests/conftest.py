from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    """One real gloo rank in a process of its own, for code that initialises global process-group state."""
    pool = RankPool(1)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two real gloo ranks: ``ranks2.run(function, *args)`` returns the two results."""
    pool = RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four of them, for slow tests."""
    pool = RankPool(4)
    yield pool
    pool.stop()


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """One real gloo rank, then two: the test runs with each."""
    pool: RankPool = request.getfixturevalue(f"ranks{request.param}")
    return pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ask for real ranks, so that the unit tier can leave them out, and begin with their files.

    They take longest: what is short comes last, so that several workers end at about the same time.
    """
    for item in items:
        if {"ranks", "ranks1", "ranks2", "ranks4"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)
    files = {item.path for item in items if item.get_closest_marker("ranks")}
    items.sort(key=lambda item: item.path not in files)
