// The summaries of search results are fetched, which a browser refuses for files: there, titles alone are shown.
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
// What scrolls sideways can be scrolled by keyboard.
addEventListener('DOMContentLoaded', () => {
  for (const o of document.querySelectorAll('pre, .table-wrapper, .math-block')) if (o.scrollWidth > o.clientWidth) o.tabIndex = 0;
});
