from __future__ import annotations

import hashlib
import io
import logging
import pickle
from http.client import IncompleteRead
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from earthprior.errors import ParamsError
from earthprior.networks import vgg16
from earthprior.networks.vgg16 import SHAPES, VGG16, read_weights, weights_sha256

URL = "https://example.org/models/vgg.pth"


@pytest.fixture(scope="module")
def weights():
    """Random weights of the right names and shapes, scaled so that activations keep their size through the stack."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (2 / (9 * shape[1])) ** 0.5
        if len(shape) == 4
        else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def empty_weights():
    """The right names and shapes without 59 MB of content: files of them are small after all checks but this one."""
    return {name: torch.zeros(()).expand(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


class Answer(io.BytesIO):
    """What a server sends: `length` is how much of it is still to come, as in http.client."""

    length = 0


def torchvision_like():
    """The stack as torchvision's vgg16().features, written out by hand."""
    layers = []
    channels = 3
    for width in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def test_the_stack_is_vgg16s():
    reference = torchvision_like()
    assert {f"features.{name}": tuple(values.shape) for name, values in reference.state_dict().items()} == SHAPES
    assert sum(torch.Size(shape).numel() for shape in SHAPES.values()) == 14_714_688


def test_every_layer_equals_an_independent_stack(weights):
    reference = torchvision_like()
    reference.load_state_dict({name.removeprefix("features."): values for name, values in weights.items()})
    images = torch.rand(2, 3, 37, 32, generator=torch.Generator().manual_seed(1))
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        found = VGG16(weights, tuple(range(31)))(images)
        for index, layer in enumerate(reference):
            x = layer(x)
            assert torch.allclose(found[index], x, atol=1e-5), index
    assert found[-1].shape == (2, 512, 1, 1)
    assert found[-1].std() > 0.1, "a comparison of zeros shows nothing"


def test_only_what_lies_before_the_last_layer_is_kept(weights):
    kept = dict(VGG16(weights, (3, 8)).named_buffers())
    assert sorted(kept) == sorted(
        ["mean", "std", *(f"{part}_{place}" for part in ("weight", "bias") for place in (0, 2, 5, 7))]
    )
    assert sum(values.numel() for values in kept.values()) == 260_160 + 6


def test_nothing_is_trained_and_no_state_dict_carries_it(weights):
    network = VGG16(weights, (3,))
    assert list(network.parameters()) == []
    assert network.state_dict() == {}
    assert not any(values.requires_grad for values in network.buffers())
    assert network.to(torch.float64).weight_0.dtype == torch.float64, "its weights move with it"


def test_weights_of_torch_save_old_and_new_and_of_safetensors_are_the_same(weights, tmp_path):
    everything = {**weights, "classifier.0.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(5)}
    torch.save(everything, tmp_path / "zip.pth")
    # The published file is from 2017.
    torch.save(everything, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(everything, tmp_path / "safe.safetensors")
    sources = [str(tmp_path / name) for name in ("zip.pth", "old.pth", "safe.safetensors")]
    for source in [*sources, (tmp_path / "zip.pth").as_uri()]:
        found = read_weights(source)
        assert found.keys() == SHAPES.keys()
        assert all(torch.equal(found[name], weights[name]) for name in SHAPES)


def test_a_file_url_may_hold_escaped_characters(empty_weights, tmp_path):
    path = tmp_path / "my weights.pth"
    torch.save(empty_weights, path)
    assert "%20" in path.as_uri()
    read_weights(path.as_uri())


def _without(name):
    return lambda weights: {key: values for key, values in weights.items() if key != name}


FAULTS = {
    "a name is missing": (_without("features.28.bias"), "features.28.bias is missing"),
    "an unknown name": (lambda weights: {**weights, "extra": torch.zeros(1)}, "extra is unknown"),
    "a wrong shape": (
        lambda weights: {**weights, "features.0.weight": torch.zeros(64, 4, 3, 3)},
        r"features.0.weight is \(64, 4, 3, 3\), not \(64, 3, 3, 3\)",
    ),
    "another network": (lambda weights: {"conv.weight": torch.zeros(1)}, "features.0.bias is missing; .* and 24 more"),
    "not a mapping": (lambda weights: [torch.zeros(1)], "is no state_dict: it holds no tensors by name"),
    "not tensors": (lambda weights: {**weights, "epoch": 3}, "the entry epoch is no tensor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_content_is_refused_and_named(fault, empty_weights, tmp_path):
    change, message = FAULTS[fault]
    path = tmp_path / "weights.pth"
    torch.save(change(empty_weights), path)
    with pytest.raises(ParamsError, match=message) as caught:
        read_weights(str(path))
    assert str(caught.value).startswith(f"perceptual.weights: {path} ")
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in str(caught.value)


class Bomb:
    """Pickled code."""

    def __reduce__(self):
        return print, ("boom",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404</html>",
        b"PK\x03\x04 cut off",
        b"\x80\x02}q\x00(X\x08",
        pickle.dumps({"features.0.bias": Bomb()}, protocol=2),
    ],
    ids=["empty", "html", "cut", "cut pickle", "code"],
)
def test_damaged_files_and_code_are_refused(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ParamsError, match=rf"{name} (is damaged, or holds something else than|names print, and was not loaded)"
    ):
        read_weights(str(tmp_path / name))
    assert "boom" not in capsys.readouterr().out


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ParamsError, match=r"nowhere.pth cannot be read \(No such file or directory\). Download https"):
        read_weights(str(tmp_path / "nowhere.pth"))
    with pytest.raises(ParamsError, match=r"nowhere.safetensors cannot be read \(No such file or directory\)"):
        read_weights(str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ParamsError, match="cannot be read"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("source", ["https://[bad", "file://[bad", "~nosuchuser/x", "a\0b"])
def test_what_is_neither_path_nor_url(source):
    for read in (read_weights, weights_sha256):
        with pytest.raises(ParamsError, match=r"^perceptual.weights: .* is neither a path nor a URL"):
            read(source)


@pytest.mark.parametrize("url", ["http://example.org/vgg.pth", "s3://bucket/vgg.pth"])
def test_other_urls_are_refused_without_a_try(url, monkeypatch):
    monkeypatch.setattr(vgg16, "urlopen", lambda *arguments, **options: pytest.fail("asked the network"))
    with pytest.raises(ParamsError, match=rf"{url} is a URL of the kind {url.split(':')[0]}"):
        read_weights(url)


def test_a_url_is_downloaded_once(empty_weights, hub, monkeypatch, caplog):
    stream = io.BytesIO()
    torch.save(empty_weights, stream)
    asked = []

    def serve(url, timeout):
        asked.append(url)
        return Answer(stream.getvalue())

    monkeypatch.setattr(vgg16, "urlopen", serve)
    with caplog.at_level(logging.INFO):
        assert read_weights(URL).keys() == SHAPES.keys()
    assert f"downloading {URL}" in caplog.text
    read_weights(URL)
    assert asked == [URL]
    other = URL.replace("models", "others")
    read_weights(other)
    assert asked == [URL, other], "two files of one name are two files"
    assert len(list(hub.glob("*-vgg.pth"))) == 2


def test_a_download_without_end_is_cut_off(hub, monkeypatch):
    monkeypatch.setattr(vgg16, "MOST_BYTES", 3 * 2**20)
    monkeypatch.setattr(vgg16, "urlopen", lambda url, timeout: Answer(b"x" * 2**23))
    with pytest.raises(ParamsError, match=r"cannot be downloaded \(it has more than 3,145,728 bytes"):
        read_weights(URL)
    assert not [path for path in hub.rglob("*") if path.suffix == ".pth"]


def test_the_checksum_in_a_name_is_checked(empty_weights, hub, monkeypatch):
    stream = io.BytesIO()
    torch.save(empty_weights, stream)
    checksum = hashlib.sha256(stream.getvalue()).hexdigest()[:8]
    monkeypatch.setattr(vgg16, "urlopen", lambda url, timeout: Answer(stream.getvalue()))
    with pytest.raises(ParamsError, match=r"SHA-256 is .*, not 00000000"):
        read_weights("https://example.org/vgg16-00000000.pth")
    read_weights(f"https://example.org/vgg16-{checksum}.pth")
    assert [path.name for path in hub.glob("*.pth")] == [f"vgg16-{checksum}.pth"], "torch's own name for it"


def _refuse(url, timeout):
    raise URLError("Name or service not known")


def _break_off(url, timeout):
    answer = Answer(b"half of it")
    answer.length = 17
    return answer


def _break_protocol(url, timeout):
    raise IncompleteRead(b"")


@pytest.mark.parametrize(
    ("server", "why"),
    [(_refuse, "Name or service"), (_break_off, "broke off 17 bytes before the end"), (_break_protocol, "Incomplete")],
)
def test_a_failed_download_is_named_and_leaves_nothing(server, why, hub, monkeypatch):
    monkeypatch.setattr(vgg16, "urlopen", server)
    with pytest.raises(ParamsError, match=rf"perceptual.weights: {URL} cannot be downloaded \(.*{why}.*Download"):
        read_weights(URL)
    assert [path.name for path in hub.iterdir() if path.suffix != ".lock"] == []


def test_a_downloaded_file_that_is_something_else_is_named_for_removal(hub, monkeypatch):
    monkeypatch.setattr(vgg16, "urlopen", lambda url, timeout: Answer(b"<html>sign in</html>"))
    with pytest.raises(ParamsError, match=r"is damaged.*Remove .*-vgg\.pth"):
        read_weights(URL)
