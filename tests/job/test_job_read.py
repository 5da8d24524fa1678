"""Reading a file and a command line: values, line numbers, and every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.reading.command_line import read_command_line, split_command_line
from nitp_titan.job.reading.extends import read_file


def read(tmp_path: Path, text: str | bytes):
    path = tmp_path / "job.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    layer, bad, problems, _ = read_file(path)
    return layer, bad, [str(problem).removeprefix(str(tmp_path) + "/") for problem in problems]


def values(layer):
    return {f"{table}.{key}": setting.value for (table, key), setting in layer.items()}


def test_file_values_and_their_lines(tmp_path):
    layer, bad, problems = read(
        tmp_path,
        """
training.steps = 7
[job]
description = '''
[training]
seq_len = 5
'''
[nitp]
"weight" = 1          # a whole number is a number
target_layer = "none"
projector = "none"
[validator]
dataloader.dataset = "text"
[validator.dataloader.nothing_of_the_kind]
[compile]
components = [
  "loss",
]
backend = "eager"
[optimizer]
lr = 1e-3
[checkpoint] # table
  enable = true
""".replace("[validator.dataloader.nothing_of_the_kind]\n", ""),
    )
    assert not bad
    assert problems == []
    assert values(layer) == {
        "training.steps": 7,
        "job.description": "[training]\nseq_len = 5\n",
        "nitp.weight": 1.0,
        "nitp.target_layer": None,
        "nitp.projector": "none",
        "validator.dataloader.dataset": "text",
        "compile.components": ["loss"],
        "compile.backend": "eager",
        "optimizer.lr": 1e-3,
        "checkpoint.enable": True,
    }
    lines = {f"{table}.{key}": setting.line for (table, key), setting in layer.items()}
    assert lines == {
        "training.steps": 2,
        "job.description": 4,
        "nitp.weight": 9,
        "nitp.target_layer": 10,
        "nitp.projector": 11,
        "validator.dataloader.dataset": 13,
        "compile.components": 15,
        "compile.backend": 18,
        "optimizer.lr": 20,
        "checkpoint.enable": 22,
    }
    assert type(layer["nitp", "weight"].value) is float


def test_inline_table_has_the_line_of_its_table(tmp_path):
    layer, _, problems = read(tmp_path, '\ntraining = { steps = 3, seq_len = "x" }')
    assert layer["training", "steps"].line == 2
    assert problems == ['job.toml:2: [training] seq_len: found "x", expected a whole number']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[trainning]\nsteps = 1", 'job.toml:1: [trainning]: unknown table; did you mean "training"?'),
        ("[[trainning]]\nsteps = 1", 'job.toml:1: [trainning]: unknown table; did you mean "training"?'),
        ("[zzz]", "job.toml:1: [zzz]: unknown table; the tables are " + ", ".join(all_tables())),
        ("[nitp]\nlambda = 1.0", 'job.toml:2: [nitp] lambda: unknown key; did you mean "weight"?'),
        ("[optimizer]\nlearning_rate = 1.0", 'job.toml:2: [optimizer] learning_rate: unknown key; did you mean "lr"?'),
        ("[tokenizer]\nzzz = 1", "job.toml:2: [tokenizer] zzz: unknown key; the keys are name, eos_token, "
         "bos_token, add_eos, add_bos, allow_special_in_text"),
        ("[[training]]\nsteps = 1", "job.toml:1: [training]: found [[training]], a list of tables, expected a table"),
        ("training = 3", "job.toml:1: [training]: found 3, expected a table"),
        ("[validator]\ndataloader = 3", "job.toml:2: [validator.dataloader]: found 3, expected a table"),
        ("steps = 3", "job.toml:1: steps: a key outside of any table; it belongs to [training] or [validator]"),
        ("dump_folder = 'a'", "job.toml:1: dump_folder: a key outside of any table; it belongs to [job]"),
        ("[training]\nstepps = 1", 'job.toml:2: [training] stepps: unknown key; did you mean "steps"?'),
        ("[training]\nlr = 1.0", "job.toml:2: [training] lr: unknown key; it belongs to [optimizer]"),
        ("[training]\ntarget_leyer = 1", "job.toml:2: [training] target_leyer: unknown key; did you mean "
         '"target_layer" of [nitp]?'),
        ("[model]\ndim = 64", "job.toml:2: [model] dim: unknown key; it belongs to [model.shape]"),
        ("[model]\nshape = 3", "job.toml:2: [model.shape]: found 3, expected a table"),
        ("[model]\nshpae = {}", 'job.toml:2: [model] shpae: unknown key; did you mean "shape"?'),
        ("[model.shape]\nn_layer = 3", 'job.toml:2: [model.shape] n_layer: unknown key; did you mean "n_layers"?'),
        ("[validator]\ndataloadr = {}", 'job.toml:2: [validator] dataloadr: unknown key; did you mean "dataloader"?'),
        ("[training]\nsteps = '5'", 'job.toml:2: [training] steps: found "5", expected a whole number'),
        ("[training]\nsteps = 5.0", "job.toml:2: [training] steps: found 5.0, expected a whole number"),
        ("[training]\nsteps = true", "job.toml:2: [training] steps: found true, expected a whole number"),
        ("[training]\nsteps = 1979-05-27", "job.toml:2: [training] steps: found 1979-05-27 (a date), expected a whole "
         "number"),
        ("[job]\ndescription = 07:32:00", "job.toml:2: [job] description: found 07:32:00 (a time), expected a string"),
        ("[optimizer]\nlr = true", "job.toml:2: [optimizer] lr: found true, expected a number"),
        ("[checkpoint]\nenable = 1", "job.toml:2: [checkpoint] enable: found 1, expected true or false"),
        ("[training]\nmax_norm = 'x'", 'job.toml:2: [training] max_norm: found "x", expected a number'),
        ("[nitp]\nshift = 2", "job.toml:2: [nitp] shift: found 2, expected one of 0, 1"),
        ("[nitp]\ntarget_layer = 'x'", 'job.toml:2: [nitp] target_layer: found "x", expected a whole number or "none"'),
        ("[lr_scheduler]\ndecay_ratio = 'x'", 'job.toml:2: [lr_scheduler] decay_ratio: found "x", expected a number or '
         '"none"'),
        ("[compile]\ncomponents = 'model'", 'job.toml:2: [compile] components: found "model", expected a list of '
         "strings"),
        ("[compile]\ncomponents = [1]", "job.toml:2: [compile] components: found [1], expected a list of strings"),
        ("[parallelism]\nmodule_fqns_per_model_part = ['a']", 'job.toml:2: [parallelism] module_fqns_per_model_part: '
         'found ["a"], expected a list, each a list of strings or "none"'),
        ("[activation_checkpoint]\nmode = 'selectiv'", 'job.toml:2: [activation_checkpoint] mode: found "selectiv", '
         'expected one of "none", "selective", "full", "memory_budget"; did you mean "selective"?'),
        ("[training]\nmixed_precision_reduce = 'bfloat16'", "job.toml:2: [training] mixed_precision_reduce: found "
         '"bfloat16", expected "float32"'),
        ("[training\nsteps = 1", "job.toml:1: TOML syntax error: Expected ']' at the end of a table declaration "
         "(column 10)"),
        ("[training]\nsteps = \n", "job.toml:2: TOML syntax error: Invalid value (column 9)"),
        ("[training]\nsteps = 1\nsteps = 2", "job.toml:3: TOML syntax error: Cannot overwrite a value (column 10)"),
        ("a = " + "[" * 5000, "job.toml: TOML inline arrays/tables are nested more than the allowed 400 levels"),
        (b"[job]\ndescription = '\xff'", "job.toml:2: not UTF-8 text, which TOML is"),
    ],
)  # fmt: skip
def test_problem_of_a_file(tmp_path, text, expected):
    assert read(tmp_path, text)[2] == [expected]


def test_all_problems_are_reported_and_the_rest_is_read(tmp_path):
    layer, bad, problems = read(tmp_path, "a = 1\n[training]\nsteps = 'x'\nseq_len = 64\nfoo = 1\n[bar]\n")
    assert [problem.split(": ")[1] for problem in problems] == ["a", "[training] steps", "[training] foo", "[bar]"]
    assert values(layer) == {"training.seq_len": 64}
    assert bad == {("training", "steps")}


def test_a_nul_is_no_part_of_a_value(tmp_path):
    (tmp_path / "job.toml").write_text('[job]\ndump_folder = "a\\u0000b"\n[compile]\ncomponents = ["mo\\u0000del"]\n')
    read = read_file(tmp_path / "job.toml")
    assert read.bad == {("job", "dump_folder"), ("compile", "components")}
    assert [(problem.line, problem.message) for problem in read.problems] == [
        (2, "found a text with the character NUL in it"),
        (4, "found a text with the character NUL in it"),
    ]


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "debug.toml").touch()
    [problem] = read_file(tmp_path / "debgu.toml")[2]
    assert str(problem) == f'{tmp_path}/debgu.toml: no such file; did you mean "{tmp_path}/debug.toml"?'
    [problem] = read_file(tmp_path / "debug")[2]
    assert str(problem).endswith(f'did you mean "{tmp_path}/debug.toml"?')
    [problem] = read_file(tmp_path / "xyz.toml")[2]
    assert str(problem).endswith("has debug.toml")
    [problem] = read_file(tmp_path / "no" / "xyz.toml")[2]
    assert str(problem).endswith(f"there is no folder '{tmp_path}/no' either")
    [problem] = read_file(tmp_path)[2]
    assert "cannot be read: Is a directory" in str(problem)


def test_byte_order_mark_and_carriage_returns(tmp_path):
    layer, _, problems = read(tmp_path, b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert problems == []
    assert layer["training", "steps"].line == 2


def words(*arguments: str):
    layer, _, problems = read_command_line(list(arguments))
    return values(layer), [str(problem).removeprefix("command line: ") for problem in problems]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.steps", "5"], {"training.steps": 5}),
        (["--training.steps=5"], {"training.steps": 5}),
        (["--training.steps", "5", "--training.steps", "6"], {"training.steps": 6}),
        (["--training.local-batch-size", "5"], {"training.local_batch_size": 5}),
        (["--training.global_batch_size", "-1"], {"training.global_batch_size": -1}),
        (["--optimizer.lr", "1e-3"], {"optimizer.lr": 1e-3}),
        (["--optimizer.lr", ".5"], {"optimizer.lr": 0.5}),
        (["--optimizer.lr", "1"], {"optimizer.lr": 1.0}),
        (["--checkpoint.enable"], {"checkpoint.enable": True}),
        (["--checkpoint.no-enable"], {"checkpoint.enable": False}),
        (["--checkpoint.no_enable"], {"checkpoint.enable": False}),
        (["--checkpoint.enable", "false"], {"checkpoint.enable": False}),
        (["--checkpoint.enable", "True"], {"checkpoint.enable": True}),
        (["--checkpoint.enable=False"], {"checkpoint.enable": False}),
        (["--nitp.target_layer", "none"], {"nitp.target_layer": None}),
        (["--model.shape.n_layers", "12"], {"model.shape.n_layers": 12}),
        (["--model.shape.tie_embeddings"], {"model.shape.tie_embeddings": True}),
        (["--model.shape.no-tie_embeddings"], {"model.shape.tie_embeddings": False}),
        (["--model.shape.tie_embeddings", "none"], {"model.shape.tie_embeddings": None}),
        (["--nitp.projector", "none"], {"nitp.projector": "none"}),
        (["--nitp.shift", "0"], {"nitp.shift": 0}),
        (["--job.description", "none"], {"job.description": "none"}),
        (["--job.description", "17"], {"job.description": "17"}),
        (["--job.description=--a=b"], {"job.description": "--a=b"}),
        (["--job.description="], {"job.description": ""}),
        (["--compile.components", "model,loss"], {"compile.components": ["model", "loss"]}),
        (["--compile.components", "model", "loss"], {"compile.components": ["model", "loss"]}),
        (["--compile.components=model, loss"], {"compile.components": ["model", "loss"]}),
        (["--compile.components", '["model"]'], {"compile.components": ["model"]}),
        (["--compile.components", ""], {"compile.components": []}),
        (["--validator.dataloader.dataset", "text"], {"validator.dataloader.dataset": "text"}),
        (["--parallelism.module_fqns_per_model_part", '[["a"], ["b"]]'],
         {"parallelism.module_fqns_per_model_part": [["a"], ["b"]]}),
        (["--parallelism.module_fqns_per_model_part", "none"], {"parallelism.module_fqns_per_model_part": None}),
        (["--override.imports", 'a.b={"x": 1, "y": 2}', "c.d,e.f"],
         {"override.imports": [("a.b", {"x": 1, "y": 2}), "c.d", "e.f"]}),
    ],
)  # fmt: skip
def test_command_line_value(arguments, expected):
    assert words(*arguments) == (expected, [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.stepps", "5"], '--training.stepps: unknown key of [training]; did you mean "--training.steps"?'),
        (["--trainin.steps", "5"], '--trainin.steps: unknown table "trainin"; did you mean "--training.steps"?'),
        (["--steps", "5"], '--steps: unknown option, expected --table.key; did you mean "--training.steps" or '
         '"--validator.steps"?'),
        (["--training.lr", "5"], "--training.lr: unknown key of [training]; it belongs to [optimizer]"),
        (["--training.no-steps"], '--training.no-steps: unknown key of [training]; did you mean "--training.steps"?'),
        (["--training.steps"], "--training.steps: no value, expected a whole number"),
        (["--training.steps", "many"], '--training.steps: found "many", expected a whole number'),
        (["--training.steps", "5", "6"], '--training.steps: found "5 6", expected a whole number'),
        (["--checkpoint.enable", "maybe"], '--checkpoint.enable: found "maybe", expected true or false'),
        (["--checkpoint.no-enable", "true"], '--checkpoint.no-enable: found "true", expected no value'),
        (["--nitp.loss", "cosin"], '--nitp.loss: found "cosin", expected one of "cosine", "mse", "smooth_l1", "kl", '
         '"generic_cosine"; did you mean "cosine"?'),
        (["stray"], '"stray": found a word without an option before it'),
    ],
)  # fmt: skip
def test_problem_of_a_command_line(arguments, expected):
    assert words(*arguments) == ({}, [expected])


def test_a_later_right_value_replaces_a_wrong_one():
    layer, bad, problems = read_command_line(["--training.steps", "x", "--training.steps", "3"])
    assert values(layer) == {"training.steps": 3}
    assert not bad
    assert len(problems) == 1


def test_split_leaves_the_file_and_our_options():
    options, others = split_command_line(
        ["--checkpoint.enable", "a.toml", "--training.steps", "3", "--ngpu", "2", "--compile.enable", "true", "--x.y=1"]
    )
    assert others == ["a.toml", "--ngpu", "2"]
    assert split_command_line(["--model.shape.router_norm", "a.toml"])[1] == ["a.toml"]
    assert split_command_line(["--model.shape.router_norm", "none", "a.toml"])[1] == ["a.toml"]
    assert split_command_line(["--training.steps=3", "a.toml"])[1] == ["a.toml"]
    assert options == ["--checkpoint.enable", "--training.steps", "3", "--compile.enable", "true", "--x.y=1"]
