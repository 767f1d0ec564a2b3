"""Tables and pictures of an evaluation by label: right numbers, and readable for many labels too."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from engine.tasks.label_tables import confusion_picture, label_table, most_confused, set_table
from engine.tasks.metrics import confusion_of
from engine.tasks.task import UNKNOWN_LABEL

NAMES = ("negative", "neutral", "positive")


def rows_of(table: str) -> dict[str, list[float]]:
    """The numbers behind each name."""
    lines = [line.split() for line in table.splitlines()[1:]]
    return {" ".join(cells[:-4]): [float(cell.replace(",", "")) for cell in cells[-4:]] for cells in lines}


def test_a_table_has_what_scikit_learn_reports() -> None:
    generator = np.random.default_rng(1)
    truth, predicted = generator.integers(0, 3, 5000), generator.integers(0, 2, 5000)
    table = label_table(confusion_of(truth, predicted, 3), NAMES)
    expected = oracle.classification_report(
        truth, predicted, target_names=NAMES, labels=[0, 1, 2], output_dict=True, zero_division=0
    )
    keys = ("precision", "recall", "f1-score", "support")
    assert rows_of(table) == {name: pytest.approx([expected[name][key] for key in keys], abs=5e-5) for name in NAMES}
    assert len({len(line) for line in table.splitlines()}) == 1, "columns stand below one another"


def test_labels_of_no_record_and_of_the_model_alone_have_lines() -> None:
    truth, predicted = np.array([0, UNKNOWN_LABEL, 2]), np.array([0, 4, 2])
    rows = rows_of(label_table(confusion_of(truth, predicted, 3), NAMES))
    assert list(rows) == [*NAMES, "label 4 of the model", "(not a label of train)"]
    assert rows["(not a label of train)"] == [0.0, 0.0, 0.0, 1.0]


def test_names_are_cut_and_chinese_ones_take_two_columns() -> None:
    table = label_table(confusion_of(np.array([0, 1]), np.array([0, 1]), 2), ("体育", "x" * 60))
    head, wide, cut = table.splitlines()
    assert len(head) == len(cut) == len(wide) + 2 and "xxx..." in cut


def test_sets_have_a_table_too() -> None:
    generator = np.random.default_rng(4)
    truth, predicted = (generator.random((200, 3)) < 0.4 for _ in range(2))
    rows = rows_of(set_table(truth, predicted, NAMES))
    scores = oracle.precision_recall_fscore_support(truth, predicted)
    for number, name in enumerate(NAMES):
        assert rows[name] == pytest.approx([column[number] for column in scores], abs=5e-5)


def test_the_most_confused_pairs_come_first() -> None:
    confusion = np.array([[5, 0, 1, 0], [7, 1, 0, 0], [0, 3, 9, 0], [0, 0, 0, 0]])
    lines = most_confused(confusion, NAMES).splitlines()
    assert [line.split() for line in lines] == [
        ["7", "87.5%", "neutral", "taken", "for", "negative"],
        ["3", "25.0%", "positive", "taken", "for", "neutral"],
        ["1", "16.7%", "negative", "taken", "for", "positive"],
    ]
    assert most_confused(np.diag([4, 4, 4, 0]), NAMES) == "none"


@pytest.mark.parametrize("num_labels", [2, 20, 150, 3000])
def test_a_picture_stays_on_a_screen(num_labels: int) -> None:
    truth = np.arange(num_labels)
    picture = confusion_picture(confusion_of(truth, np.roll(truth, 1), num_labels), [f"label {n}" for n in truth])
    height, width, colours = picture.shape
    assert colours == 3 and picture.dtype == np.uint8 and 100 < height < 1400 and 100 < width < 1400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1


def test_a_picture_has_rows_of_true_labels_and_columns_of_predictions() -> None:
    """Of 150 labels, whose cells have no names: a dark cell where label 10 is taken for label 140."""
    confusion = np.zeros((151, 151), dtype=np.int64)
    confusion[10, 140] = 3
    picture = confusion_picture(confusion, [str(number) for number in range(150)])
    dark = np.argwhere((picture == (8, 48, 107)).all(axis=-1))
    (top, left), (bottom, right) = dark.min(axis=0), dark.max(axis=0)
    cell = bottom - top + 1
    assert right - left + 1 == cell == 960 // 150
    assert (top - 20) // cell == 10 and (left - 8) // cell == 140
