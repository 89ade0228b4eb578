"""No way to load weights runs what is hidden in a file."""

from contextlib import suppress

import hostile
import pytest
import torch

from util import checkpoint
from util.errors import UserError

KINDS = {**hostile.RUNS_CODE, **hostile.ODD}
pytestmark = pytest.mark.filterwarnings("ignore:.*(pickle protocol|TorchScript archive)")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def path(kind, tmp_path):
    KINDS[kind](tmp_path / checkpoint.NAME, tmp_path / "canary")
    assert not (tmp_path / "canary").exists()
    return tmp_path / checkpoint.NAME


@pytest.mark.parametrize("kind", hostile.RUNS_CODE)
def test_a_careless_load_would_run_it(kind, path, tmp_path):
    """Else the tests below could not fail."""
    with suppress(Exception):  # many of them have done it when they fail
        torch.load(path, weights_only=False)
    assert (tmp_path / "canary").exists()


def test_it_is_refused_in_one_line(path, tmp_path):
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()
    assert not (tmp_path / "canary").exists()
