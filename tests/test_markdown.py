from fedstill.markdown import grid


def test_a_grid() -> None:
    assert grid(["a", "b", "c"], [["1", "2", "3"]]) == "| a | b | c |\n| --- | ---: | ---: |\n| 1 | 2 | 3 |"
    assert grid(["a", "b"], [], left=None) == "| a | b |\n| --- | --- |"
    assert grid(["a", "b", "c"], [], left=2).endswith("| --- | --- | ---: |")
