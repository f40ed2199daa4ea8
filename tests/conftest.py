import os,warnings
from pathlib import Path

import matplotlib,pytest

matplotlib.use('agg')
root = Path(__file__).parent.parent

@pytest.fixture(scope='session')
def data_dir():
    "A function from a name to a folder of real data; the test is skipped where it is absent"
    base = Path(os.environ.get('CFEXT_DATA', root.parent/'shared'/'data'))
    def _inner(name):
        if not (base/name).exists(): pytest.skip(f"no {name} in CFEXT_DATA ({base}): set it to a folder that holds the data")
        return base/name
    return _inner

@pytest.fixture
def quiet():
    "Warnings off"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
