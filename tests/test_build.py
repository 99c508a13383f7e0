from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from earthprior import build
from earthprior.errors import EarthPriorError, ParamsError
from earthprior.files import write_json
from support import toy_linear


@pytest.fixture
def finished(make_params, tmp_path):
    """The folder of a finished pretraining, its params and its weights."""
    params = make_params()
    linear = toy_linear()
    task = build.task(params, linear)
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.add_(0.01)
    linear.save(tmp_path / "linear.safetensors")
    save_file(task.network.state_dict(), tmp_path / "network.safetensors")
    write_json(
        tmp_path / "config.json",
        {"params": params.model_dump(mode="json"), "fingerprint": "f" * 12, "foreign_files": {}},
    )
    return tmp_path, params, task


def test_a_pretrained_task_is_rebuilt_from_its_own_folder(finished):
    folder, params, task = finished
    rebuilt, trained = build.pretrained_task(folder)
    assert trained == params
    xt, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 800])
    with torch.no_grad():
        assert torch.equal(rebuilt.denoise(xt, t), task.denoise(xt, t))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"unet_film.channels": [16_384] * 6, "unet_film.blocks": 20}, r"unet_film with [\d,]+ weights needs about"),
        (
            {"network": "unet_att_d", "unet_att_d.filter_config": [16_384] * 6, "unet_att_d.block_num": [20] * 6},
            r"unet_att_d with [\d,]+ weights needs about",
        ),
    ],
)
def test_a_network_that_no_machine_holds_is_refused_before_it_is_made(make_params, overrides, words):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ParamsError, match=words + r" [\d,.]+ GB of memory, and this machine has [\d,.]+ GB; lower it"):
        build.network(make_params(overrides), 4, 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 100_000  # KB


@pytest.mark.parametrize("name", ["config.json", "linear.safetensors", "network.safetensors"])
def test_a_missing_file_is_named(finished, name):
    (finished[0] / name).unlink()
    with pytest.raises(EarthPriorError, match=f"lacks {name}.*dvc repro pretrain"):
        build.pretrained_task(finished[0])


@pytest.mark.parametrize("name", ["linear.safetensors", "network.safetensors"])
def test_a_damaged_file_is_a_clear_error(finished, name):
    path = finished[0] / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EarthPriorError, match="damaged"):
        build.pretrained_task(finished[0])


def test_weights_of_another_network_are_refused(finished):
    folder = finished[0]
    weights = load_file(folder / "network.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "network.safetensors")
    with pytest.raises(EarthPriorError, match=r"does not fit config\.json"):
        build.pretrained_task(folder)


def test_statistics_of_other_bands_are_refused(make_params):
    stats = {"bands": ["nir", "red", "green", "blue"]}
    with pytest.raises(EarthPriorError, match="dvc repro stats"):
        build.normalizer(make_params(), stats)


def test_a_gpu_that_is_not_there_is_refused(make_params, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParamsError, match=r"operation\.device is cuda:1"):
        build.device(make_params({"operation.device": "cuda:1"}))
    assert build.device(make_params({"operation.device": "auto"})) == torch.device("cpu")
    assert build.device(make_params({"operation.device": "cpu"})) == torch.device("cpu")


def test_precision(make_params):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    auto, plain, half = (make_params({"precision": word}) for word in ("auto", "float32", "bfloat16"))
    assert [build.autocast_dtype(p, cpu) for p in (auto, plain, half)] == [None, None, torch.bfloat16]
    assert [build.autocast_dtype(p, cuda) for p in (auto, plain, half)] == [torch.bfloat16, None, torch.bfloat16]


@pytest.mark.parametrize(("capability", "told"), [("AVX2", True), ("AVX512", False)])
def test_bfloat16_is_told_of_where_the_cpu_emulates_it(make_params, monkeypatch, capability, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    auto, half = (make_params({"precision": word}) for word in ("auto", "bfloat16"))
    said = build.slow_precision(half, torch.device("cpu"))
    assert ("set precision: float32" in str(said)) == told
    assert build.slow_precision(auto, torch.device("cpu")) is None
    assert build.slow_precision(half, torch.device("cuda")) is None


@pytest.mark.parametrize("name", build.NOISE_SCHEDULES)
def test_the_noise_schedule_is_the_one_selected(make_params, name):
    schedule = build.schedule(make_params({"diffusion.noise_schedule": name, "diffusion.timesteps": 50}))
    assert schedule.timesteps == 50
    assert (float(schedule.betas[-1]) > 0.5) == (name == "cosine")
