"Adds to `pyproject.toml` what `settings.ini` holds: author, keywords, license, requirements and extras."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
cfg = ConfigParser(interpolation=None)
cfg.read(here/'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
extras = {k.removeprefix('extra_'): v.split() for k,v in s.items() if k.startswith('extra_')}
extras['dev'] = s['dev_requirements'].split()

setup(author=s['author'], keywords=s['keywords'].split(), license=s['license'],
      install_requires=s['requirements'].split(), extras_require=extras,
      long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Developers',
                   'Topic :: Scientific/Engineering :: Artificial Intelligence'])
