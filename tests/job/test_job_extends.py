"""A file over the files that it extends: who wins, where problems are, and chains that lead nowhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import tomli

from nitp_titan.cli import main as cli
from nitp_titan.job import JobError, load_job
from nitp_titan.job.write import resolved_toml


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write name -> text and go to their folder, so that messages have short names."""
    monkeypatch.chdir(tmp_path)

    def write(**texts: str) -> None:
        for name, text in texts.items():
            path = Path(name.replace("__", "/") + ".toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def problems(file: str, *overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_job(file, list(overrides), 1)
    return str(caught.value).splitlines()


def values(file: str, *keys: str) -> list:
    job = load_job(file, [], 1)
    return [job[table][key] for table, _, key in (name.rpartition(".") for name in keys)]


def test_child_overrides_key_by_key_through_generations(files):
    files(
        grandparent="[training]\nsteps = 1\nseq_len = 32\n[nitp]\nweight = 0.1\ntarget_layer = 3\n",
        parent='extends = "grandparent.toml"\n[training]\nsteps = 2\n[validator.dataloader]\nseed = 5\n',
        child='extends = "parent.toml"\n[nitp]\nweight = 0.3\ntarget_layer = "none"\n',
    )
    keys = ("training.steps", "training.seq_len", "nitp.weight", "nitp.target_layer", "validator.dataloader.seed")
    assert values("child.toml", *keys) == [2, 32, 0.3, 1, 5]
    assert values("parent.toml", *keys) == [2, 32, 0.1, 3, 5]
    job = load_job("child.toml", ["--training.seq_len=64"], 1)
    assert (job["training"]["seq_len"], job.sources["training"]["steps"]) == (64, "file")


def test_of_several_files_a_later_one_wins(files):
    files(
        a="[training]\nsteps = 1\nseq_len = 16\n",
        b="[training]\nsteps = 2\n",
        first='extends = ["a.toml", "b.toml"]\n',
        second='extends = ["b.toml", "a.toml"]\n',
        third='extends = ["a.toml", "b.toml"]\n[training]\nsteps = 3\n',
        none="extends = []\n[training]\nsteps = 4\n",
    )
    assert values("first.toml", "training.steps", "training.seq_len") == [2, 16]
    assert values("second.toml", "training.steps") == [1]
    assert values("third.toml", "training.steps") == [3]
    assert values("none.toml", "training.steps") == [4]


def test_names_are_relative_to_the_file_that_says_them(files, tmp_path, monkeypatch):
    files(
        base="[training]\nsteps = 7\n",
        near__middle='extends = "../base.toml"\n',
        far__child='extends = "../near/middle.toml"\n[training]\nseq_len = 32\n',
        far__absolute=f'extends = "{tmp_path}/base.toml"\n',
    )
    assert values("far/child.toml", "training.steps", "training.seq_len") == [7, 32]
    assert values("far/absolute.toml", "training.steps") == [7]
    monkeypatch.chdir("far")
    assert values("child.toml", "training.steps") == [7]


def test_a_link_to_a_folder_is_followed_as_the_system_does(files):
    files(base="[training]\nsteps = 1\n", real__deep__x="", real__base="[training]\nsteps = 2\n")
    os.symlink("real/deep", "link")
    Path("link/child.toml").write_text('extends = "../base.toml"\n')
    assert values("link/child.toml", "training.steps") == [2]


def test_problems_name_the_file_and_line_of_the_key(files):
    files(
        parent="[training]\nstepss = 1\n[nitp]\ntarget_layer = 7\n[optimizer]\nlr = 'x'\n",
        child='extends = "parent.toml"\n\n[nitp]\nweight = -1.0\n[foo]\n',
    )
    assert [re.split(" found|; the tables", problem)[0].rstrip(":") for problem in problems("child.toml")] == [
        'parent.toml:2: [training] stepss: unknown key; did you mean "steps"?',
        "parent.toml:4: [nitp] target_layer",
        "parent.toml:6: [optimizer] lr",
        "child.toml:4: [nitp] weight",
        "child.toml:5: [foo]: unknown table",
    ]


def test_a_wrong_value_of_a_parent_is_reported_though_the_child_has_another(files):
    files(parent="[nitp]\nweight = 'x'\n", child='extends = "parent.toml"\n[nitp]\nweight = -1\n')
    assert [problem.split(",")[0] for problem in problems("child.toml")] == [
        'parent.toml:2: [nitp] weight: found "x"',
        "child.toml:3: [nitp] weight: found -1.0",
    ]
    files(parent="[training]\nseq_len = 'x'\n", child='extends = "parent.toml"\n[training]\nseq_len = 9000\n')
    assert [problem.split(",")[0] for problem in problems("child.toml")] == [
        'parent.toml:2: [training] seq_len: found "x"',
        "child.toml:3: [training] seq_len: found 9000",
    ]
    # And the other way round nothing is said of what the child's wrong value hides.
    files(parent="[nitp]\nweight = -1\n", child='extends = "parent.toml"\n[nitp]\nweight = "x"\n')
    assert problems("child.toml") == ['child.toml:3: [nitp] weight: found "x", expected a number']


def test_the_parents_place_of_a_contradiction(files):
    extends = 'extends = "parent.toml"\n'
    files(parent="[training]\nlocal_batch_size = 3\n", child=f"{extends}[training]\nglobal_batch_size = 8\n")
    [problem] = problems("child.toml")
    assert problem.startswith("child.toml:3: [training] global_batch_size: found a global_batch_size of 8")
    files(parent="[training]\nseq_len = 9000\n", child=extends)
    [problem] = problems("child.toml")
    assert problem == "parent.toml:2: [training] seq_len: found 9000, expected at most the model's 8192"


# A child says what only its parent's model can have: nothing is to be said of that where the parent is not known.
DEEP = "[nitp]\ntarget_layer = 20\n"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"child": f'extends = "child.toml"\n{DEEP}'},
         'child.toml:1: extends: found "child.toml", which closes a cycle: child.toml -> child.toml'),
        ({"child": f'extends = "a.toml"\n{DEEP}', "a": 'extends = "sub/b.toml"', "sub__b": '\nextends = ["../a.toml"]'},
         'sub/b.toml:2: extends: found "../a.toml", which closes a cycle: a.toml -> sub/b.toml -> a.toml'),
        ({"child": f'extends = "sub/../child.toml"\n{DEEP}', "sub__x": ""},
         'child.toml:1: extends: found "sub/../child.toml", which closes a cycle: child.toml -> child.toml'),
        ({"child": f'\nextends = "pretrian.toml"\n{DEEP}', "pretrain": ""},
         'child.toml:2: extends: found "pretrian.toml", no such file; did you mean "pretrain.toml"?'),
        ({"child": f'extends = "sub/pretrain"\n{DEEP}', "sub__pretrain": ""},
         'child.toml:1: extends: found "sub/pretrain", no such file; did you mean "sub/pretrain.toml"?'),
        ({"child": f'extends = "no/base.toml"\n{DEEP}'},
         "child.toml:1: extends: found \"no/base.toml\", no such file; there is no folder 'no' either"),
        ({"child": f'extends = "sub"\n{DEEP}', "sub__x": ""}, 'child.toml:1: extends: found "sub", which is a folder'),
        ({"child": f"extends = 3\n{DEEP}"},
         "child.toml:1: extends: found 3, expected a file name or a list of file names"),
        ({"child": f'extends = ["a.toml", 3]\n{DEEP}', "a": ""},
         'child.toml:1: extends: found ["a.toml", 3], expected a file name or a list of file names'),
        ({"child": f'extends = ""\n{DEEP}'},
         'child.toml:1: extends: found "", expected a file name or a list of file names'),
        ({"child": f'extends = "a\\u0000b"\n{DEEP}'}, "child.toml:1: extends: found"),
        ({"child": f'[extends]\nfile = "a.toml"\n{DEEP}'},
         'child.toml:1: extends: found {file = "a.toml"}, expected a file name or a list of file names'),
        ({"child": f'extends = "a.toml"\n{DEEP}', "a": "[training\n"},
         "a.toml:1: TOML syntax error: Expected ']' at the end of a table declaration (column 10)"),
    ],
)  # fmt: skip
def test_a_chain_that_leads_nowhere_is_one_line(files, capsys, texts, expected):
    files(**texts)
    [problem] = problems("child.toml")
    assert problem.startswith(expected)
    assert cli.main(["check", "child.toml"]) == 2
    assert capsys.readouterr().err.splitlines() == [problem]


def test_the_nearest_file_is_named_as_the_child_would(files):
    files(sub__child='extends = "../pretrian.toml"\n', pretrain="")
    [problem] = problems("sub/child.toml")
    assert problem.endswith('found "../pretrian.toml", no such file; did you mean "../pretrain.toml"?')


def test_every_broken_end_of_a_chain_is_reported(files):
    files(child='extends = ["x.toml", "a.toml"]\n', a='extends = "y.toml"\n[training]\nsteps = 0.5\n')
    assert [
        problem.split(",")[0] for problem in problems("child.toml", "--nitp.shift=2", "--nitp.target_layer=20")
    ] == [
        'child.toml:1: extends: found "x.toml"',
        'a.toml:1: extends: found "y.toml"',
        "a.toml:3: [training] steps: found 0.5",
        'command line: --nitp.shift: found "2"',
    ]


def test_two_ways_to_one_file_are_no_cycle(files):
    files(
        base="[training]\nsteps = 1\nseq_len = 16\n",
        left='extends = "base.toml"\n[training]\nsteps = 2\n',
        right='extends = "base.toml"\n[training]\nseq_len = 32\n',
        child='extends = ["left.toml", "right.toml"]\n',
    )
    # Each file counts with all that it extends: right.toml says steps = 1, too.
    assert values("child.toml", "training.steps", "training.seq_len") == [1, 32]
    files(base="[training]\nsteps = 'x'\n")
    assert len(problems("child.toml")) == 1


@pytest.mark.parametrize("text", ['[job]\nextends = "a.toml"', '[job]\nextend = "a.toml"', 'extend = "a.toml"'])
def test_a_misplaced_or_misspelt_key_is_told_where_it_stands(files, text):
    files(child=text)
    [problem] = problems("child.toml")
    assert problem.endswith('; "extends" stands at the top of the file, before the first table')


def test_the_command_line_has_no_such_option(files, capsys):
    files(child="", a="")
    assert cli.main(["check", "child.toml", "--extends=a.toml"]) == 2
    assert "--extends: unknown option, expected --table.key" in capsys.readouterr().err


def test_the_resolved_file_extends_nothing_and_is_the_same_job(files):
    files(parent="[training]\nsteps = 3\n", child='extends = "parent.toml"\n[nitp]\nweight = 0.5\n')
    job = load_job("child.toml", [], 1)
    text = resolved_toml(job)
    assert "extends" not in tomli.loads(text)
    Path("resolved.toml").write_text(text)
    assert load_job("resolved.toml", [], 1).tables == job.tables
