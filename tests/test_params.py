from __future__ import annotations

import copy
import datetime
import math
import os
import random
import resource
from pathlib import Path

import pytest

from earthprior.errors import ParamsError
from earthprior.params import SELECTORS, Params, active, evaluation, known_keys, load, parse, read_mapping

COMMITTED = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture(scope="module")
def committed():
    return read_mapping(COMMITTED)


@pytest.fixture
def content(committed):
    return copy.deepcopy(committed)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "params.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def put(content, key, value):
    *sections, last = key.split(".")
    for section in sections:
        content = content[section]
    content[last] = value


def faults_of(content):
    with pytest.raises(ParamsError) as caught:
        parse(content, "params.yaml")
    return str(caught.value)


def fault_of(content, key, value):
    put(content, key, value)
    lines = faults_of(content).splitlines()
    assert lines[0] == "params.yaml has 1 fault:"
    assert len(lines) == 2
    return lines[1]


def test_the_committed_file_is_sound_and_holds_every_key(content):
    params = load(COMMITTED)
    assert isinstance(params, Params)
    flat = [
        f"{key}.{inner}" if isinstance(value, dict) else key
        for key, value in content.items()
        for inner in (value if isinstance(value, dict) else [None])
    ]
    assert sorted(flat) == sorted(known_keys())


def test_all_faults_are_reported_at_once_each_with_key_value_and_what_is_allowed(content):
    wrong = {
        "lr": True, "batch_size": "sixteen", "epochs": 2.5, "ema_decay": 1.0, "loss_fn": "mae", "grad_clip": -1,
        "threads": 0, "weight_decay": math.nan, "data.nodata": [0, math.inf], "data.bands": [], "data.dir": 5,
        "data.buffer": -1, "data.max_bad_fraction": 1.5, "augmentation.flip": "yes",
        "augmentation.scale_factor": [1.25, 0.8], "augmentation.br_range": [0.1], "diffusion.timesteps": 1,
        "unet_film.channels": [32, 0], "adamw.betas": [0.9, 1], "evaluate.sampler": "euler",
        "operation.device": "gpu", "seed": None, "learning_rate": 0.1, "data.chipsize": 224,
    }  # fmt: skip
    for key, value in wrong.items():
        put(content, key, value)
    del content["optimizer"], content["evaluate"]["steps"]
    del content["cosine"]
    message = faults_of(content)
    lines = {line.split(":")[0].strip(): line for line in message.splitlines()[1:]}
    expected = {
        "lr": "True is not allowed; a number is needed, not true or false",
        "batch_size": "'sixteen' is not allowed; a number is needed, not text",
        "epochs": "2.5 is not allowed; Input should be a valid integer",
        "ema_decay": "1.0 is not allowed; Input should be less than 1",
        "loss_fn": "'mae' is not allowed; Input should be 'mse', 'l1', 'charbonnier', 'ssim', 'perceptual' or",
        "grad_clip": "-1 is not allowed; Input should be greater than 0",
        "threads": "0 is not allowed; Input should be greater than or equal to 1",
        "weight_decay": "nan is not allowed; Input should be a finite number",
        "data.nodata.1": "inf is not allowed; Input should be a finite number",
        "data.bands": "[] is not allowed",
        "data.dir": "5 is not allowed; Input should be a valid string",
        "data.buffer": "-1 is not allowed",
        "data.max_bad_fraction": "1.5 is not allowed; Input should be less than or equal to 1",
        "augmentation.flip": "'yes' is not allowed; Input should be a valid boolean",
        "augmentation.scale_factor": "[1.25, 0.8] is not allowed; the range runs backwards",
        "augmentation.br_range.1": "missing",
        "diffusion.timesteps": "1 is not allowed; Input should be greater than or equal to 2",
        "unet_film.channels.1": "0 is not allowed",
        "adamw.betas.1": "1 is not allowed; Input should be less than 1",
        "evaluate.sampler": "'euler' is not allowed; Input should be 'dpm_solver', 'ddim' or 'ddpm'",
        "operation.device": "'gpu' is not allowed",
        "seed": "None is not allowed",
        "learning_rate": "unknown key",
        "data.chipsize": "unknown key; did you mean data.chip_size?",
        "optimizer": "missing; add it",
        "evaluate.steps": "missing; add it",
        "cosine": "missing; add it",
    }
    assert message.startswith(f"params.yaml has {len(expected)} faults:\n")
    assert set(lines) == set(expected)
    for key, text in expected.items():
        assert text in lines[key], lines[key]


NUMBERS = [
    "seed", "threads", "lr", "weight_decay", "epochs", "grad_clip", "data.chip_size", "data.crop_px",
    "diffusion.beta_start", "adamw.eps", "cosine.eta_min", "evaluate.probe_rho", "operation.readers",
]  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [True, False, "1", "1e-3", "", [1], {"a": 1}])
def test_for_a_number_nothing_else_will_do(content, key, value):
    assert f"{key}: {value!r} is not allowed" in fault_of(content, key, value)


@pytest.mark.parametrize("key", ["normalization.apply_normalization", "augmentation.flip", "unet_film.attention"])
@pytest.mark.parametrize("value", [0, 1, "on", "true", None])
def test_for_yes_or_no_only_true_and_false_will_do(content, key, value):
    assert f"{key}: {value!r} is not allowed" in fault_of(content, key, value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("objektive", "objective"),
        ("batchsize", "batch_size"),
        ("steps", "evaluate.steps"),
        ("timesteps", "diffusion.timesteps"),
        ("diffusion.time_steps", "diffusion.timesteps"),
        ("data.band", "data.bands"),
        ("unet_film.upmode", "unet_att_d.upmode"),
        ("evaluate.crop_px", "data.crop_px"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(content, typed, meant):
    assert fault_of(content, typed, 1) == f"  {typed}: unknown key; did you mean {meant}?"


def test_a_key_like_no_other_is_to_be_removed(content):
    assert fault_of(content, "xyzzy", 1) == "  xyzzy: unknown key; remove it"


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("data.crop_px", 500, "crop_px 500 is larger than the chips (224 px)"),
        ("data.bands", ["red", "red"], "name a band twice"),
        ("warmup_epochs", 8, "warmup_epochs 8 leaves no epoch of 8 to train in"),
        ("diffusion.beta_start", 0.5, "beta_start 0.5 is above beta_end 0.02"),
        ("unet_att_d.block_num", [2, 2], "block_num has 2 entries, filter_config 6"),
        ("evaluate.steps", 1001, "evaluate.steps 1001 exceed diffusion.timesteps 1000"),
        ("accumulation_steps", 3, "batch_size 16 cannot be worked through in 3 equal parts"),
        ("diffusion.zero_terminal_snr", True, "evaluate.sampler dpm_solver divides by the last alpha"),
        ("cosine.eta_min", 0.01, "cosine.eta_min 0.01 is above lr 0.001"),
        ("normalization.clip_percent", 3, "clip_percent 3 is not among the percentiles that stats.json keeps"),
        ("normalization.clip_percent", 50, "should be less than 50"),
        ("loss_weights", {"alpha": 0, "beta": 0, "gamma": 0}, "nothing to learn"),
        ("sgd", {"momentum": 0, "nesterov": True}, "nesterov needs a momentum above 0"),
        ("multistep.milestones", [20, 10], "milestones [20, 10] must rise"),
        ("loss_fn", "perceptual", "loss_fn perceptual needs VGG16 weights"),
        ("sam.base_optimizer", "sam", "'sam' is not allowed"),
        ("lr_schedule", "step", "step.step_size names no epoch of 8 after warm-up"),
        ("lr_schedule", "multistep", "multistep.milestones names no epoch of 8 after warm-up"),
    ],
)
def test_values_that_do_not_fit_together(content, key, value, part):
    content["step"]["step_size"], content["multistep"]["milestones"] = 8, [1, 8]
    assert part in fault_of(content, key, value)


def test_sizes_follow_from_crop_and_buffer(content):
    put(content, "data.buffer", 8)
    assert parse(content, "params.yaml").data.read_px == 240
    assert parse(content, "params.yaml").data.train_px == content["data"]["crop_px"]
    put(content, "data.crop_px", None)
    assert parse(content, "params.yaml").data.train_px == 240


def test_betas_that_leave_the_unit_interval_are_found_at_load(content):
    put(content, "diffusion.timesteps", 20)
    assert parse(content, "params.yaml").diffusion.beta_range == (1e-6, 0.02)
    put(content, "diffusion.scale_betas", True)
    assert "use at least 21 timesteps" in faults_of(content)
    put(content, "diffusion.timesteps", 21)
    assert parse(content, "params.yaml").diffusion.beta_range == pytest.approx((1e-6 * 1000 / 21, 0.02 * 1000 / 21))
    put(content, "diffusion.noise_schedule", "cosine")
    put(content, "diffusion.timesteps", 20)
    assert parse(content, "params.yaml").diffusion.timesteps == 20


def test_pure_noise_at_the_end_needs_an_objective_that_can_stand_it(content):
    for key, value in {"diffusion.zero_terminal_snr": True, "evaluate.sampler": "ddim"}.items():
        put(content, key, value)
    parse(content, "params.yaml")
    put(content, "diffusion.precondition", "none")
    assert "zero_terminal_snr with objective eps" in faults_of(content)
    put(content, "objective", "v")
    parse(content, "params.yaml")


@pytest.mark.parametrize("rotation", [None, [30], [-180, -90, 90, 180], {"low": -15, "high": 15.5}])
def test_rotation_is_a_list_a_range_or_null(content, rotation):
    put(content, "augmentation.rotation_degree", rotation)
    found = parse(content, "params.yaml").augmentation.rotation_degree
    assert (list(found) if isinstance(rotation, list) else found) == rotation


def test_a_range_of_rotations_may_be_written_on_the_command_line(tmp_path):
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_text(COMMITTED.read_text())
    apply_overrides(path, ["augmentation.rotation_degree=-15..15.5"])
    assert load(path).augmentation.rotation_degree == {"low": -15, "high": 15.5}


@pytest.mark.parametrize(
    ("rotation", "part"),
    [
        ([], "give angles to choose from"),
        (90, "give angles to choose from"),
        ({"low": 1}, "give angles to choose from"),
        ({"low": 1, "high": 2, "mid": 1.5}, "give angles to choose from"),
        ({"low": 2, "high": 1}, "the range runs backwards"),
        ("2..1", "the range runs backwards"),
        ("15", "give angles to choose from"),
        ("nan..1", "nan is no angle in degrees"),
        ([10**400], "is no angle in degrees"),
        ([0, True], "True is no angle in degrees"),
        (["90"], "'90' is no angle in degrees"),
        ([math.inf], "inf is no angle in degrees"),
    ],
)
def test_a_rotation_that_is_none_of_these(content, rotation, part):
    assert part in fault_of(content, "augmentation.rotation_degree", rotation)


@pytest.mark.parametrize("text", ["1e-05", "1e-5", "1E-5", "0.00001", "1.0e-5"])
def test_every_spelling_of_a_small_number_is_the_number(write, text):
    original = COMMITTED.read_text()
    assert "\nlr: 0.001\n" in original
    assert load(write(original.replace("\nlr: 0.001\n", f"\nlr: {text}\n"))).lr == 1e-5


def test_numbers_written_by_dvc_come_back(tmp_path):
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    rng = random.Random(0)
    for exponent in range(-12, 6):
        value = rng.uniform(1, 10) * 10.0**exponent
        path.write_text(COMMITTED.read_text())
        apply_overrides(path, [f"lr={value!r}", f"weight_decay={10.0**exponent!r}", "epochs=20"])
        params = load(path)
        assert (params.lr, params.weight_decay, params.epochs) == (value, 10.0**exponent, 20)


def test_any_float_survives_the_way_through_dvc_and_back(tmp_path):
    from dvc.utils.serialize import dump_yaml

    rng = random.Random(1)
    values = [0.0, 1e-12, 1e6, 0.1 + 0.2, *(math.exp(rng.uniform(math.log(1e-12), math.log(1e6))) for _ in range(300))]
    dump_yaml(tmp_path / "floats.yaml", {"values": values})
    assert read_mapping(tmp_path / "floats.yaml")["values"] == values


def test_params_come_back_from_their_own_dump(committed):
    params = parse(committed, "params.yaml")
    assert parse(params.model_dump(mode="json"), "config.json") == params


@pytest.mark.parametrize("word", ["on", "off", "yes", "no"])
def test_words_that_yaml_1_1_takes_for_booleans_are_words(write, word):
    assert read_mapping(write(f"label: {word}")) == {"label": word}


def test_numbers_that_yaml_1_1_takes_for_octal_or_minutes(write):
    assert read_mapping(write("a: 010\nb: 1:30\nc: 0o10\nd: 1_000")) == {"a": 10, "b": "1:30", "c": 8, "d": 1000}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("# nothing but a comment\n", "is empty"),
        ("- lr\n- epochs\n", "is a list, not a mapping"),
        ("just text", "is a str, not a mapping"),
        ("lr: 1\nepochs: 3\nlr: 2\n", 'duplicate key "lr"'),
        ("data:\n\tdir: x\n", "line 2"),
        ("lr: [1, 2\n", "is not valid YAML: line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("lr: 1\nlr: 2", 'is not valid YAML: line 2, column 1: found duplicate key "lr" with value "2" (original'),
        ("lr: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("lr: *nowhere", "undefined alias"),
        ("[[[[1]]]]: x", "unhashable type"),
        ("? {a: [1]}\n: x", "unhashable"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: 2024-13-45", "month must be in"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!bool perhaps", "not valid YAML"),
        ("a: !!int", "not valid YAML"),
        ("[" * 1500, "not valid YAML"),
        ("lr: \x00", "not valid YAML"),
        (b"lr: \xff\xfe", "not UTF-8 text (byte 4)"),
    ],
)
def test_what_is_no_parameter_file_says_what_it_is(write, text, part):
    with pytest.raises(ParamsError) as caught:
        load(write(text))
    assert part in str(caught.value)
    assert str(caught.value).startswith("params.yaml ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1: 2", "null: 3", "? [1, 2]\n: 3", "true: 1", ".nan: 1"])
def test_odd_but_valid_yaml_is_a_list_of_faults(write, text):
    with pytest.raises(ParamsError, match=r"params\.yaml has \d+ faults"):
        load(write(text))


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load(write("\ufeff" + COMMITTED.read_text())).seed == 0


def test_a_missing_file_and_a_folder_in_its_place(tmp_path):
    with pytest.raises(ParamsError, match=r"params\.yaml not found .*project's root"):
        load(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=r"cannot be read: Is a directory"):
        load(tmp_path)


def test_params_cannot_be_changed_in_passing(committed):
    params = parse(committed, "params.yaml")
    with pytest.raises(Exception, match="frozen"):
        params.lr = 1.0
    with pytest.raises(Exception, match="frozen"):
        params.data.chip_size = 1


def test_no_key_has_a_name_that_dvcs_run_cache_ignores():
    # Such keys restore stale outputs in silence: https://github.com/iterative/dvc/issues/10296
    assert not {"size", "nfiles"} & {part for key in known_keys() for part in key.split(".")}


@pytest.mark.parametrize(("network", "idle"), [("unet_film", "unet_att_d"), ("unet_att_d", "unet_film")])
@pytest.mark.parametrize(
    ("lr_schedule", "sections"), [("cosine", {"cosine"}), ("cosinewarm", {"cosinewarm"}), ("none", set())]
)
def test_active_holds_the_selected_sections_alone(content, network, idle, lr_schedule, sections):
    content["network"], content["lr_schedule"] = network, lr_schedule
    content["data"]["crop_px"] = 64
    keys = active(parse(content, "params.yaml"))
    named = {key.split(".")[0] for key in keys if "." in key}
    assert named == {"data", "normalization", "augmentation", "diffusion", "adamw", network} | sections
    assert idle not in named
    assert keys["network"] == network
    assert keys["data.crop_px"] == 64
    assert keys["data.bands"] == ["red", "green", "blue", "nir"]


def test_active_changes_with_what_changes_weights_and_with_nothing_else(content):
    before = active(parse(content, "params.yaml"))
    for key, value in {"evaluate.steps": 3, "operation.readers": 9, "unet_att_d.dropout_rate": 0.5}.items():
        put(content, key, value)
        assert active(parse(content, "params.yaml")) == before
    acting = {"threads": 5, "epochs": 99, "seed": 1, "data.nodata": [0], "unet_film.dropout_rate": 0.5}
    for key, value in acting.items():
        put(content, key, value)
        after = active(parse(content, "params.yaml"))
        assert after != before
        before = after


@pytest.mark.parametrize(
    ("choice", "sections"),
    [
        ({"optimizer": "sgd"}, {"sgd"}),
        ({"optimizer": "sam", "sam.base_optimizer": "rmsprop"}, {"sam", "rmsprop"}),
        ({"loss_fn": "ssim"}, {"ssim", "adamw"}),
        ({"loss_fn": "hybrid_light"}, {"ssim", "loss_weights", "adamw"}),
        ({"loss_fn": "perceptual", "perceptual.weights": "vgg16.pth"}, {"perceptual", "adamw"}),
        ({"lr_schedule": "onecycle"}, {"onecycle", "adamw"}),
    ],
)
def test_a_choice_activates_what_it_rests_on(content, choice, sections):
    for key, value in choice.items():
        put(content, key, value)
    named = {key.split(".")[0] for key in active(parse(content, "params.yaml")) if "." in key}
    always = {"data", "normalization", "augmentation", "diffusion", "unet_film", "cosine"}
    assert named - always == sections - always


@pytest.mark.parametrize(
    ("choice", "idle"),
    [
        ({}, {"objective", "diffusion.min_snr_gamma"}),
        ({"diffusion.weighting": "min_snr"}, set()),
        ({"diffusion.weighting": "uniform"}, {"diffusion.min_snr_gamma"}),
        ({"diffusion.noise_schedule": "cosine", "diffusion.weighting": "min_snr"},
         {"diffusion.beta_start", "diffusion.beta_end", "diffusion.scale_betas"}),
        ({"lr_schedule": "onecycle", "diffusion.weighting": "min_snr"}, {"warmup_epochs"}),
        ({"normalization.apply_normalization": False, "diffusion.weighting": "min_snr"},
         {"normalization.normal_strategy", "normalization.clip_percent", "normalization.clip_val"}),
    ],
)  # fmt: skip
def test_keys_that_a_choice_leaves_without_effect_are_not_active(content, choice, idle):
    for key, value in choice.items():
        put(content, key, value)
    keys = set(active(parse(content, "params.yaml")))
    candidates = {"objective", "diffusion.min_snr_gamma", "diffusion.beta_start", "diffusion.beta_end"}
    candidates |= {"diffusion.scale_betas", "warmup_epochs", "normalization.normal_strategy"}
    candidates |= {"normalization.clip_percent", "normalization.clip_val"}
    assert candidates - keys == idle


def test_a_range_is_one_active_parameter(content):
    put(content, "augmentation.rotation_degree", {"low": -15, "high": 15})
    keys = active(parse(content, "params.yaml"))
    assert keys["augmentation.rotation_degree"] == {"low": -15, "high": 15}
    assert set(keys) <= set(known_keys())


def test_evaluation_holds_what_only_evaluate_reads(committed):
    keys = evaluation(parse(committed, "params.yaml"))
    assert keys["evaluate.sampler"] == "dpm_solver"
    assert {key.split(".")[0] for key in keys} == {"evaluate"}


def test_every_selectable_section_exists():
    for selector, sections in SELECTORS.items():
        assert selector in Params.model_fields
        assert set(sections) <= set(Params.model_fields)


NINES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level}\n  <<: [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


@pytest.mark.parametrize("text", [NINES, MERGES, "lr: &x [*x]", f"{NINES}{{}}", "a: " + "[" * 20 + "]" * 20])
def test_a_file_that_grows_when_it_is_read_is_not_read(write, text):
    # The last of NINES and of MERGES are 3,486,784,401 values; {}: with the rest of params.yaml, and used as bands.
    bands = COMMITTED.read_text().replace("bands: [red, green, blue, nir]", "bands: *a9")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ParamsError, match="more than 10,000 values, or is nested more than 10 deep"):
        load(write(text.replace("{}", bands)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_a_file_of_another_size_or_kind_is_not_read(write, tmp_path):
    with pytest.raises(ParamsError, match="more than 1,048,576 bytes"):
        load(write("lr: 1\n" + "#" * 2**20))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ParamsError, match=r"pipe\.yaml is no regular file"):
        load(tmp_path / "pipe.yaml")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", "x" * 1_000_000, "text of 1,000,000 characters"),
        ("data.dir", "x" * 1_000_000, "text of 1,000,000 characters"),
        ("lr", 10**400, "a whole number of 1,329 bits"),
        ("data.dir", "\ud800", "half a character"),
        ("data.dir", "a\0b", "a null character"),
        ("data.dir", b"data", "binary data"),
        ("data.dir", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), "a date (text needs quotes)"),
        ("data.image_columns", {"a", "b"}, "a set (which has no order)"),
        ("data.bands", ["x" * 90] * 1000, "'name a band twice'"),
        ("augmentation.rotation_degree", ["x" * 4000], "is no angle in degrees"),
    ],
)
def test_what_no_key_takes_is_told_in_a_few_words(content, key, value, words):
    fault = fault_of(content, key, value)
    assert fault.startswith(f"  {key.split('.')[0]}")
    assert words.strip("'") in fault
    assert len(fault) < 500


def test_a_number_that_python_does_not_write_is_told_all_the_same(content):
    # in hexadecimal it may be read, and its thousands of decimal digits may not be written
    assert fault_of(content, "lr", 1 << 80_000).startswith("  lr: a whole number of 80,001 bits is not allowed")


def test_ten_thousand_faults_are_counted_not_listed(content):
    for index in range(9_000):
        content[f"key {index} " + "y" * 4000] = 1
    message = faults_of(content)
    assert message.startswith("params.yaml has 9,000 faults:")
    assert message.endswith("\n  and 8,900 more")
    assert len(message) < 100 * 200


def test_a_key_cannot_speak_to_the_terminal(content):
    assert fault_of(content, "\x1b[2J\ud800", 1) == "  \\x1b[2J\\ud800: unknown key; remove it"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("perceptual.weights", "https://me:secret@example.org/vgg.pth"),
        ("perceptual.weights", "https://secret@example.org/vgg.pth"),
        ("perceptual.weights", "https://example.org/vgg.pth?download=1&access_token=secret"),
        ("perceptual.weights", "https://bucket.example.org/vgg.pth?X-Amz-Expires=60&X-Amz-Signature=secret"),
        ("tune.storage", "postgresql://me:secret@example.org/studies"),
        ("tune.storage", "postgresql://example.org/studies?user=me&password=secret"),
    ],
)
def test_a_password_is_refused_and_not_repeated(content, key, value):
    fault = fault_of(content, key, value)
    assert key.split(".")[1] in fault
    assert "params.yaml is kept with every run" in fault
    assert "secret" not in fault


@pytest.mark.parametrize(
    ("typed", "value", "fault"),
    [
        ("diffusio", {"timesteps": 10}, "  diffusio: unknown key; did you mean the section diffusion?"),
        ("diffusion", 3, "  diffusion: 3 is not allowed; a section of keys is needed: timesteps, noise_schedule, "),
        ("evaluate", None, "  evaluate: None is not allowed; a section of keys is needed: sampler, steps, "),
        ("tune.space", [1], "  tune.space: [1] is not allowed; a section of keys is needed: lr: {low: "),
        ("tune.space", {"lr": 3}, "  tune.space.lr: 3 is not allowed; a section of keys is needed: low, high, log, "),
        ("tune.spac", {"lr": 3}, "  tune.spac: unknown key; did you mean tune.space?"),
    ],
)
def test_sections_and_what_stands_in_their_place(content, typed, value, fault):
    assert fault_of(content, typed, value).startswith(fault)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.chip_size", 2**53), ("data.buffer", 10**6), ("data.crops_per_chip", 10**9), ("epochs", 2**53),
        ("batch_size", 10**9), ("val_batch_size", 10**9), ("threads", 2**40), ("operation.readers", 10**6),
        ("diffusion.timesteps", 10**9), ("unet_film.channels", [10**9]), ("unet_film.channels", [8] * 64),
        ("unet_film.blocks", 10**6), ("unet_film.time_embedding_dim", 10**9), ("unet_att_d.filter_config", [8, 10**9]),
        ("data.bands", [f"b{index}" for index in range(2000)]), ("evaluate.samples", 10**9), ("tune.trials", 10**12),
    ],
)  # fmt: skip
def test_what_would_only_fill_the_memory_or_never_end_is_refused_at_load(content, key, value):
    put(content, "lr_schedule", "step")  # whose faults are looked for epoch by epoch
    assert "is not allowed; " in faults_of_one(content, key, value)


def faults_of_one(content, key, value):
    put(content, key, value)
    message = faults_of(content)
    assert f"  {key}" in message
    assert len(message) < 2000
    return message
