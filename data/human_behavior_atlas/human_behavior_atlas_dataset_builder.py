"""Human Behavior Atlas for TFDS: `python -m omnisapiens_jax.atlas.prepare` behind the builder's methods. No tensorflow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from omnisapiens_jax.atlas import prepare, records
from omnisapiens_jax.atlas.labels import HBA


@dataclasses.dataclass
class AtlasConfig(tfds.core.BuilderConfig):
    """`all`, one dataset by its name, or all but some: `AtlasConfig.of(exclude=["meld_emotion", "meld_senti"])`."""

    datasets: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: str | None = None, exclude: list[str] | tuple[str, ...] = ()) -> AtlasConfig:
        """As `prepare.Config.of`."""
        config = prepare.Config.of(dataset, exclude)
        return cls(name=config.name, description=f"{len(config.datasets)} of the sixteen datasets", datasets=config.datasets)


class Builder(FileReaderBuilder):
    """Reads a prepared atlas, or prepares one from the release's folder, which is `manual_dir`."""

    name = records.NAME
    VERSION = tfds.core.Version(records.VERSION)
    RELEASE_NOTES = {records.VERSION: "Encoded media, descriptors pooled and frame by frame."}
    BUILDER_CONFIGS = [
        AtlasConfig.of(),
        *(AtlasConfig.of(dataset.name) for dataset in HBA.datasets),
        *(AtlasConfig.of(exclude=[dataset.name]) for dataset in HBA.datasets),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Fetch the release (parquet, or JSONL and tars) and name its folder: DownloadConfig(manual_dir=FOLDER)."

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=records.features(), description=records.DESCRIPTION, homepage=records.HOMEPAGE, license="CC-BY-NC-4.0"
        )

    def download_and_prepare(self, *, download_config: tfds.download.DownloadConfig | None = None, **_: Any) -> None:
        """Prepares `download_config.manual_dir` where it is not prepared yet; a call that was killed goes on where it was.

        With `download_config.beam_options` Beam does the work. Rows that cannot be used are an error; the command line can skip them.
        """
        if not self.data_path.exists():
            self._download_and_prepare(None, download_config or tfds.download.DownloadConfig())
        self.info.read_from_directory(self.data_path)

    def _download_and_prepare(self, dl_manager: None, download_config: tfds.download.DownloadConfig) -> None:
        if download_config.manual_dir is None:
            raise ValueError(self.MANUAL_DOWNLOAD_INSTRUCTIONS)
        if download_config.beam_runner is not None:
            raise ValueError('name the runner in beam_options: PipelineOptions(["--runner=..."])')
        config = prepare.Config(self.builder_config.name, self.builder_config.datasets)
        prepare.prepare(Path(download_config.manual_dir), self.data_dir_root, config, beam=download_config.beam_options)
