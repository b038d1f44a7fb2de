"""setuptools, able to see the installed torch: an isolated build would otherwise fetch and compile against another one."""

import site
import sysconfig

from setuptools.build_meta import *  # noqa: F403  (a build backend is exactly these names)

site.addsitedir(sysconfig.get_path("purelib"))
