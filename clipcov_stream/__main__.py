"""`python -m clipcov_stream recipe.yaml [key.sub=value ...]`."""

from clipcov_stream.train import main

if __name__ == "__main__":
    main()
