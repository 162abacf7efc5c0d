"""What pyproject.toml cannot say: a wheel carries recipes/configs as pipelines/configs, so that the demos run without a clone."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("recipes/configs", Path(self.build_lib, "pipelines", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithConfigs})
