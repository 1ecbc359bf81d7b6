"""How good generated speech is: metrics, intervals, tables and comparisons."""
