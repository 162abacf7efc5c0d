"""The page of a bundle: the model in a browser, with its libraries beside it, so that nothing is fetched from elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from pipelines.core.config import BundleConfig
from pipelines.core.errors import InputError
from pipelines.runtime.infer import file_checksum

HERE = Path(__file__).parents[1] / "runtime"
SECONDS = 60  # that a page which nobody asked for may take
# The npm packages of the page, each with the version and the licence, and the sha256 of each file that is taken from it.
RUNTIME_LIBRARY = "onnxruntime-web"
TOKENIZER_LIBRARY = "@huggingface/tokenizers"
LIBRARIES = {
    RUNTIME_LIBRARY: (
        "1.30.0",
        "MIT",
        {
            "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
            "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
            "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
        },
    ),
    TOKENIZER_LIBRARY: (
        "0.2.0",
        "Apache-2.0",
        {"tokenizers.min.mjs": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a"},
    ),
}


def add_page(directory: Path, bundle: BundleConfig, libraries: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """Write index.html and web/ into the bundle `directory`; return the versions of the libraries, or {} and why there is no page.

    Raises InputError where a page was asked for and its libraries are not to be had.
    """
    if bundle.page is False:
        return {}, "--web false"
    web = directory / "web"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            packages = [
                Path(bundle.web_assets) / library if bundle.web_assets else fetch(library, Path(scratch), bundle.page)
                for library in libraries
            ]
        except InputError as error:
            if bundle.page:
                raise
            return {}, str(error)
        web.mkdir()
        for library, package in zip(libraries, packages, strict=True):
            copy_library(library, package / "dist", web)
    shutil.copyfile(HERE / "index.html", directory / "index.html")
    shutil.copyfile(HERE / "model.mjs", web / "model.mjs")
    lines = [
        f"{name} {LIBRARIES[name][0]}: {LIBRARIES[name][1]}, https://www.npmjs.com/package/{name}" for name in libraries
    ]
    (web / "LICENSES.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: LIBRARIES[name][0] for name in libraries}, ""


def fetch(library: str, scratch: Path, wanted: bool | None) -> Path:
    """The npm package, unpacked below `scratch`; nothing of it is run. Where it is not `wanted` for certain, npm tries once."""
    version = LIBRARIES[library][0]
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        command = ["npm", "pack", "--loglevel=error", f"{library}@{version}"]
        if not wanted:
            command.append("--fetch-retries=0")
        timeout = None if wanted else SECONDS
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=timeout)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, subprocess.SubprocessError) as error:
        found = error.stderr.partition("\n")[0] if isinstance(error, subprocess.CalledProcessError) else error
        raise InputError(
            f"expected npm to fetch {library}@{version} for the page, found: {found}. Install npm, or name a node_modules that has it "
            "with --web_assets, or leave the page out with --web false."
        ) from error
    return folder / "package"


def copy_library(library: str, source: Path, web: Path) -> None:
    """Copy the files of a library; raises InputError for one that is missing or not that of the version that the page was tried with."""
    version, _, files = LIBRARIES[library]
    for name, checksum in files.items():
        path = source / name
        if not path.is_file() or file_checksum(path) != checksum:
            found = "another version of it" if path.is_file() else "no such file"
            raise InputError(
                f"expected {name} of {library} {version} at {path}, found {found}. Run npm install {library}@{version}, and name that "
                "node_modules with --web_assets."
            )
        shutil.copyfile(path, web / name)
