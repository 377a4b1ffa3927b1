"""Lines of JSON are read as they were written, whatever a model wrote into them."""

from dpo_wrapper.training.files import read_json_lines, write_json_lines


def test_lines_that_hold_line_separators_come_back(tmp_path):
    lines = [{"policy": "one\u2028two\x85three\nfour\r", "step": 3}, {"policy": "", "step": 4}]
    file = tmp_path / "samples.jsonl"
    assert read_json_lines(file) == []
    write_json_lines(file, lines)
    assert read_json_lines(file) == lines
