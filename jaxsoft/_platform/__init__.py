"""Programs that replace the plain formula on a platform."""
