"""The recipes in PyTorch, from the same `Recipe` objects (extra: compare).

One implementation for three uses: `torch:` arms of comparisons, `bench --against torch`, and the exact tests of the
package against it in float64 (`tests/reference`). It is written from the same specification as the package; what the
two share are recipes, as data. The modules have the names of their counterparts in the package.
"""
