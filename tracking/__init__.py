"""What is recorded of trials, and where: MLflow and Parquet."""
