"""A few of the random mutations of params.yaml; ``python tests/mutations.py`` makes a thousand."""

import importlib.util
from pathlib import Path


def test_a_mutated_params_yaml_is_refused_in_one_line_or_can_be_built():
    spec = importlib.util.spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = []
    assert module.main(40, 2, said.append) == 0, said
