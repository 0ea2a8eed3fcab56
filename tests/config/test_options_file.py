"""Files of options: the same checks as for words, faults with file and line, and the way back."""

import json
from dataclasses import asdict

import pytest

from megablocks_utils.config import check_leftovers, parse_args, parse_known_args
from megablocks_utils.config.record import format_config, format_record, read_recorded_options
from megablocks_utils.errors import ConfigurationError

SHARDING = "use_megablocks_sharding: true\n"


@pytest.fixture
def read(tmp_path):
    """Parse a file of this text, and words beside it."""

    def parse(text: str, line: str = "", entry_point: str = "fsdp2"):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        words = [*line.split(), "--config", str(path)]
        return parse_known_args(words, entry_point=entry_point)

    return parse


def parse(line: str):
    return parse_args(line.split(), entry_point="fsdp2")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("# nothing yet\n", ""),
        ("learning_rate: 1e-5", "--learning_rate 1e-5"),  # a text to YAML 1.1
        ("learning_rate: 1", "--learning_rate 1"),
        ("save_strategy: no", "--save_strategy no"),  # False to YAML 1.1
        ("save_strategy: 'no'", "--save_strategy no"),
        ("shuffle: no", "--shuffle False"),
        ("shuffle: 'false'", "--shuffle False"),
        ("debug: on\nseed: 7", "--debug --seed 7"),
        ("gradient_checkpointing: off", "--gradient_checkpointing False"),
        ("gradient_checkpointing: true", ""),
        ("resume_from_checkpoint: true", "--resume_from_checkpoint true"),
        ("output_dir: 2026-11-30", "--output_dir 2026-11-30"),  # a date to YAML
        ("output_dir: 1_000", "--output_dir 1_000"),
        ("report_to: [tensorboard]", "--report_to tensorboard"),
        ("report_to:\n  - tensorboard\n", "--report_to tensorboard"),
        ("report_to: tensorboard", "--report_to tensorboard"),
        ("ep_size: null\nsave_total_limit:\n", ""),
        (SHARDING + "expert_degree: 2", "--use_megablocks_sharding True --ep_size 2"),
        ("max-seq-length: 12", "--max_seq_length 12"),
    ],
)
def test_a_line_of_a_file_is_a_word_of_the_command_line(read, text, line):
    assert read(text)[0] == parse(line)


def test_the_command_line_wins(read):
    config, _ = read(SHARDING + "ep_size: 4\nseed: 7\n", "--expert_degree 2 --shuffle False")
    wanted = "--use_megablocks_sharding True --ep_size 2 --seed 7 --shuffle False"
    assert config == parse(wanted)


REFUSALS = {
    "seed: 7\nlearning_rat: 1": "{}:2: unknown option --learning_rat; did you mean "
    "--learning_rate?",
    "learning_rat:": "{}:1: unknown option --learning_rat; did you mean --learning_rate?",
    "seed: 1\nshuffle: true\nseed: 2": "{}:3: --seed is given twice, as 1 and as 2; give it once.",
    "ep_size: 1\nexpert_degree: 2": "{}:2: --ep_size 1 and --expert_degree 2 are the same option "
    "given twice; leave one of the two out.",
    "seed: [1, 2]": "{}:1: --seed is 1 and 2, but it takes one value.",
    "seed: yes": "{}:1: --seed is yes, but it must be a whole number from 0 to 4294967295.",
    "seed: 0x10": "{}:1: --seed is 0x10, but it must be a whole number from 0 to 4294967295.",
    "seed:": "{}:1: --seed has no value, but it must be a whole number from 0 to 4294967295.",
    "debug:": "{}:1: --debug has no value, but it must be True or False.",
    "debug: 1": "{}:1: --debug is 1, but it must be True or False.",
    "report_to: []": "{}:1: --report_to has no value, but it must be none, "
    "tensorboard, wandb, mlflow or trackio.",
    "save_strategy: off": "{}:1: --save_strategy is off, but it must be no, steps or epoch.",
    "output_dir: ''": "{}:1: --output_dir is empty, but it must be a name or path.",
    "optim:\n  learning_rate: 1": "{}:2: optim must be a value or a list of values, with nothing "
    "nested in it.",
    "report_to: [none, [none]]": "{}:1: report_to must be a value or a list of values, with "
    "nothing nested in it.",
    "seed: !!python/object:os.system 1": "{}:1: seed must be a value or a list of values, with "
    "nothing nested in it.",
    "- seed": "{}:1: no option, but every line must be name: value.",
    "seed 7": "{}:1: no option, but every line must be name: value.",
    "[a]: 1": "{}:1: a name must be one word.",
    "config: other.yaml": "{}:1: --config is an option of the command line alone.",
}


@pytest.mark.parametrize("text", REFUSALS)
def test_faults_have_file_and_line(read, tmp_path, text):
    with pytest.raises(ConfigurationError) as caught:
        check_leftovers(read(text)[1], {"adam_beta1"})
    assert str(caught.value) == REFUSALS[text].format(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("seed: 1\nshuffle: [", "{}:2: not valid YAML ("),
        ("seed: 1\n\tshuffle: 1", "{}:2: not valid YAML ("),
        ("seed: *none", "{}:1: not valid YAML ("),
        ("seed: 1\n---\nseed: 2", "{}:2: not valid YAML ("),
        ("seed: \0", "{}: not valid YAML ("),
        ("a: " + "[" * 5000, "{} is nested too deeply"),
    ],
)
def test_what_is_no_yaml(read, tmp_path, text, start):
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    assert str(caught.value).startswith(start.format(tmp_path / "run.yaml"))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path, start in ((tmp_path / "none.yaml", "it cannot be read (No such file or directory)"),
                        (tmp_path, "it cannot be read (Is a directory)")):  # fmt: skip
        with pytest.raises(ConfigurationError) as caught:
            parse(f"--config {path}")
        assert str(caught.value).startswith(f"--config is {path}, but {start}; it must be ")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"output_dir: \xe9t\xe9")
    with pytest.raises(ConfigurationError, match="that is no text in UTF-8"):
        parse(f"--config {path}")


def test_options_of_training_arguments_pass(read, tmp_path):
    text = (
        "adam_beta1: 0.8\nlabel_names: [a, b]\nuse_cpu: on\nlogging_strategy: no\nhub_model_id:\n"
    )
    _, leftovers = read(text, "--adam_beta1 0.7 --weight_decay 1", entry_point="fsdp1")
    assert [word for given in leftovers for word in given.words()] == [
        *("--adam_beta1", "0.7", "--label_names", "a", "b", "--use_cpu", "True"),
        *("--logging_strategy", "no"),
    ]
    known = {"adam_beta1", "label_names", "use_cpu", "logging_strategy"}
    with pytest.raises(ConfigurationError) as caught:
        check_leftovers(leftovers, known)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}:5: unknown option --hub_model_id")
    with pytest.raises(ConfigurationError, match=r"run.yaml:1: --bf16 is given, but dtypes come"):
        read("bf16: true", entry_point="fsdp1")


EP = "--use_megablocks_sharding True"
LINES = [
    "",
    "--shuffle False --debug --seed 0 --learning_rate 1e-5 --weight_decay 0.1",
    f"{EP} --ep_size 2",
    f"{EP} --use_scattermoe True",
    f"{EP} --kernel eager --gradient_checkpointing selective --router_aux_loss_coef 0",
    "--ep_size 1 --gradient_checkpointing False --report_to tensorboard",
    "--use_lora all --kernel triton --lora_r 8 --sync_each_batch True",
    "--use_lora attn-only --resume_adapter out --lora_alpha 4",
    "--precision bf16 --optim_dtype float32 --dtype bfloat16 --save_total_limit 3",
    "--save_strategy steps --save_steps 0.25 --warmup_steps 3 --max_steps 7",
    "--resume_from_checkpoint true --output_dir no --model_name_or_path 1e3 --data_path ~",
    "--output_dir=#1 --model_name_or_path=a:b --data_path=été",
]


@pytest.mark.parametrize("entry_point", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("line", LINES)
def test_printed_options_are_read_back_to_the_same_run(read, tmp_path, line, entry_point):
    words = line.split()
    if entry_point == "fsdp1":
        words += ["--adam_beta1", "0.9", "--label_names", "a", "no", "--use_cpu", "--run_name=-1"]
    config, leftovers = parse_known_args(words, entry_point=entry_point)
    again, theirs = read(format_config(config, leftovers), entry_point=entry_point)
    assert again == config
    assert [(given.flag, given.values) for given in theirs] == [
        (given.flag, given.values or ("True",)) for given in leftovers
    ]
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"options": asdict(config)}))
    assert read(format_record(read_recorded_options(record)), entry_point=entry_point)[0] == config


@pytest.mark.parametrize("text", ["[]", "{}", '{"options": {}}', '{"options": {"entry_point": 1}}'])
def test_a_record_without_options(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_recorded_options(path)
    assert str(caught.value) == (
        f"--run is {path}, but it holds no options of a run; it must be the run.json of a run."
    )
