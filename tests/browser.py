"A headless Chromium for the tests of pages: what it asked for, what it complained of, and whether everybody can use what it shows"
import shutil
from contextlib import contextmanager

import pytest

names = ('chromium','chromium-browser','google-chrome','google-chrome-stable')

def chromium():
    "The browser's path; the test is skipped where there is none, or nothing to drive it"
    pytest.importorskip('playwright', reason='playwright, of the dev requirements, drives the browser')
    path = next((p for n in names if (p := shutil.which(n))), None)
    if path is None: pytest.skip(f"no browser ({', '.join(names)}) on this machine: apt-get install chromium")
    return path

class Watched:
    "A page, with the requests and complaints that it gave rise to"
    def __init__(self, page, inside):
        self.page,self.bad,self.inside = page,[],inside
        page.on('console', lambda m: m.type in ('error','warning') and self.bad.append(f'console: {m.text}'))
        page.on('pageerror', lambda e: self.bad.append(f'error: {e}'))
        page.on('dialog', lambda d: (self.bad.append(f'dialog: {d.message}'), d.dismiss()))
        page.on('request', lambda r: r.url.startswith((*inside,'data:','blob:')) or self.bad.append(f'asked for {r.url}'))
        page.on('response', lambda r: r.status>=400 and not r.request.is_navigation_request() and self.bad.append(f'{r.status} {r.url}'))
        page.on('requestfailed', lambda r: 'ERR_ABORTED' in (r.failure or '') or self.bad.append(f'failed: {r.url}'))
    def clean(self):
        assert not self.bad, f'{self.page.url}: {self.bad}'

@contextmanager
def open_browser():
    "A browser, and a function that makes watched pages in it"
    from playwright.sync_api import sync_playwright
    path = chromium()
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        def _new(*inside, dark=False, width=1280, height=900):
            c = b.new_context(viewport=dict(width=width, height=height), color_scheme='dark' if dark else 'light')
            c.set_default_timeout(90_000) # a busy machine
            return Watched(c.new_page(), inside)
        try: yield _new
        finally: b.close()

def faults(page):
    "What axe finds wrong with a page: contrast, labels, names, order of headings, landmarks"
    axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason='axe-playwright-python, of the dev requirements, brings axe-core')
    res = axe.Axe().run(page).response
    return [f"{v['id']}: {v['nodes'][0]['html'][:160]} ({len(v['nodes'])} times)" for v in res['violations']]
