"A small competition and untrained runs of every kind, for tests of prediction and submission."
from pathlib import Path

from rsnape_kit.models.keras_backend import save_weights
from rsnape_kit.models.registry import build_model
from rsnape_kit.runs.config import KerasConfig, PetaFormerConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE

PIXELS = InputConfig((PE,), "fixed", 32)


def keras_run(folder, model: str, fold: int = 0, **settings) -> Path:
    "A Keras run that was never trained."
    network = {"width": .125} if model == "resnet3d" else {"variant": "b0", "width": .25, "depth": .1}
    settings = {"pixels": PIXELS, "frames": 4, "batch": 8, "network": network} | settings
    config = KerasConfig(model=model, fold=fold, seed=fold, **settings)
    run = open_run(Path(folder) / config.name, config)
    save_weights(build_model(config), run / "best.npz")
    return run


def torch_run(folder, fold: int = 0) -> Path:
    "A PetaFormer run that was never trained."
    import torch

    network = dict(width=.125, depth=.1, dim=24, layers=1, heads=4)
    config = PetaFormerConfig(network=network, pixels=PIXELS, groups=4, slices=3, batch=2, fold=fold, seed=fold)
    run = open_run(Path(folder) / config.name, config)
    torch.save(build_model(config, expected()).state_dict(), run / "weights.pt")
    return run


def expected():
    "A truth to take constants from."
    from rsnape_kit.testing import simulate_truth
    return simulate_truth(50, slices=(3, 6, 9))
