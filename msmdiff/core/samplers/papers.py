"""The `sample` sections that the papers evaluate with, by name.

Scales are in one convention, eps_u + s (eps_c - eps_u): U-ViT's count from 0 and are one more here.
"""

from typing import Any

_ADM: dict[str, Any] = {
    "sampler": "ddpm",
    "steps": 250,
    "times": "adm",
    "variance": "large",
    "clip": False,
}
_FIRST3 = {**_ADM, "cfg_channels": "first3"}
_UVIT: dict[str, Any] = {
    "steps": 50,
    "method": "fast",
    "order": 3,
    "clip": False,
    "rounding": "half_up",
}
_MASKDM: dict[str, Any] = {
    "sampler": "ddim",
    "eta": 1.0,
    "times": "maskdm",
    "clip": True,
    "eps_after_clip": "raw",
}

SAMPLINGS: dict[str, dict[str, Any]] = {
    "dit": {
        **_FIRST3,
        "cfg_scale": 1.5,
        "rounding": "half_up",
    },  # sample_ddp.py, the figures of the paper
    "dit-cfg4": {**_FIRST3, "cfg_scale": 4.0, "rounding": "half_up"},  # sample.py, the pictures
    "mdtv2": {**_FIRST3, "cfg_scale": 3.8, "cfg_power": 4.0, "rounding": "truncate"},
    "mdtv1-infer": {
        **_FIRST3,
        "steps": 500,
        "cfg_scale": 5.0,
        "cfg_power": 0.01,
        "rounding": "truncate",
    },
    "edt": {
        **_FIRST3,
        "cfg_scale": 4.0,
        "amm": "default",
        "rounding": "half_up",
    },  # image_generator.py
    "edt-nocfg": {**_FIRST3, "cfg_scale": 1.0, "amm": "default", "rounding": "half_up"},
    # SiT's SDE, Euler's steps: linspace(1, 0.04, 250), and a last one without noise.
    "sit": {
        "sampler": "euler_maruyama",
        "steps": 250,
        "times": "uniform",
        "end": 0.04,
        "clip": False,
        "cfg_scale": 1.5,
        "cfg_channels": "first3",
        "rounding": "half_up",
    },
    # U-ViT's latent models without a convolution: DPM-Solver++ on a discrete schedule.
    "uvit": {**_UVIT, "sampler": "dpm_solver++", "times": "uniform", "cfg_scale": 1.4},
    "uvit-512": {**_UVIT, "sampler": "dpm_solver++", "times": "uniform", "cfg_scale": 1.7},
    "uvit-t2i": {**_UVIT, "sampler": "dpm_solver++", "times": "uniform", "cfg_scale": 2.0},
    # Its continuous models: DPM-Solver on even log-SNR; the unconditional ones were scored with
    # 1000 SDE steps.
    "uvit-continuous": {**_UVIT, "sampler": "dpm_solver", "times": "logsnr", "end": 1e-4},
    "uvit-sde": {
        "sampler": "euler_maruyama",
        "steps": 1000,
        "times": "uniform",
        "clip": False,
        "rounding": "half_up",
    },
    "maskdm": {**_MASKDM, "steps": 250, "rounding": "half_up"},  # eval.py
    "maskdm-500": {**_MASKDM, "steps": 500, "rounding": "half_up"},  # main.py
}
