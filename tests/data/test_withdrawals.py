import json

import pytest

from euroflax.data.withdrawals import Withdrawal, continued, read_history, write_history
from euroflax.experiment import ExperimentError

A, B = {"s": ("a",)}, {"s": ("a", "b")}


def test_a_list_holds_from_where_the_run_first_goes_on_with_it():
    assert continued((), A, 0) == (Withdrawal(0, A),)
    begun = (Withdrawal(0, A),)
    assert continued(begun, A, 40) == begun
    assert continued(begun, B, 40) == (Withdrawal(0, A), Withdrawal(40, B))
    assert continued((*begun, Withdrawal(40, B)), {}, 60) == (*begun, Withdrawal(40, B), Withdrawal(60, {}))


def test_a_run_without_a_record_left_nothing_out_before():
    assert continued((), A, 40) == (Withdrawal(0, {}), Withdrawal(40, A))
    assert continued((), {}, 40) == (Withdrawal(0, {}),)


def test_what_lies_behind_the_checkpoint_is_forgotten():
    history = (Withdrawal(0, A), Withdrawal(40, B), Withdrawal(80, {}))
    assert continued(history, {}, 60) == (Withdrawal(0, A), Withdrawal(40, B), Withdrawal(60, {}))
    assert continued(history, B, 40) == (Withdrawal(0, A), Withdrawal(40, B))
    assert continued(history, B, 0) == (Withdrawal(0, B),)


def test_the_record_is_read_back_and_a_harmed_one_is_said(tmp_path):
    assert read_history(tmp_path) == ()
    history = (Withdrawal(0, A), Withdrawal(40, B))
    write_history(tmp_path, history)
    assert read_history(tmp_path) == history
    for content in ("{", json.dumps([{"position": 0}]), "3"):
        (tmp_path / "withdrawn.json").write_text(content)
        with pytest.raises(
            ExperimentError, match=r"withdrawn.json is harmed; restore it, or give the run another name"
        ):
            read_history(tmp_path)
