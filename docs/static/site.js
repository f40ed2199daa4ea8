// The summaries of search results are fetched, which a browser refuses for files: there, titles alone are shown.
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
// What scrolls sideways can be scrolled by keyboard.
addEventListener('DOMContentLoaded', () => {
  for (const o of document.querySelectorAll('pre, .table-wrapper, .math-block')) if (o.scrollWidth > o.clientWidth) o.tabIndex = 0;
});
// What the theme leaves unsaid to screen readers.
addEventListener('DOMContentLoaded', () => {
  for (const o of document.querySelectorAll('.caption[role=heading]')) o.ariaLevel = '2';
  for (const o of document.querySelectorAll('dt.sig dl')) o.setAttribute('role', 'presentation');
  for (const [c, n] of [['.sidebar-drawer', 'pages'], ['.toc-drawer', 'on this page']]) document.querySelector('aside' + c)?.setAttribute('aria-label', n);
});
