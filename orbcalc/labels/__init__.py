"""Labels: GFN1-xTB orbital charges, reference calculators, the store; never torch, never Dask."""
