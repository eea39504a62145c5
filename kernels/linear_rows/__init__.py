"""``xquant::linear_rows``: a linear layer of few rows, at the speed at which its weights can be read."""
